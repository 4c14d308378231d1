"""One evaluation of a model: recitation of memorized sets, perplexity and nDCG on held-out text."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kfac.batch import TokenBatch
from lightning_kfac.data.questions import Question
from lightning_kfac.decoding import greedy_continuations
from lightning_kfac.metrics import NDCG, ExactAnswer, Memorization, Perplexity
from lightning_kfac.metrics.functional import top_tokens


class Evaluation(nn.Module):
    """Metrics of one evaluation, fed batch by batch.

    Args:
        sets: Names of the memorized sets. Metrics of ``memorized`` carry no prefix, others their name.
        questions: Names of the question sets; their metrics carry them as a prefix.
        end_of_text: Ids at which a continuation ends.
        reference: Top tokens of the unedited model, as left in ``rankings`` by its own evaluation over
            the same batches; ``self`` in that evaluation; ``None`` measures no nDCG.

    Attributes:
        rankings: int32 [B, T, 10] of each held-out batch.
        continuations: Per set, sequence number -> continuation (of this rank).
    """

    def __init__(
        self,
        sets: Iterable[str],
        questions: Iterable[str],
        end_of_text: Collection[int],
        reference: list[Tensor] | Literal["self"] | None,
    ):
        super().__init__()
        self.memorization = nn.ModuleDict({name: Memorization(end_of_text) for name in sets})
        self.answers = nn.ModuleDict({name: ExactAnswer() for name in questions})
        self.perplexity, self.ndcg = Perplexity(), NDCG()
        self.end_of_text, self.reference = end_of_text, reference
        self.rankings: list[Tensor] = []
        self.continuations: dict[str, dict[int, list[int]]] = {name: {} for name in self.memorization}

    def add_sequences(self, name: str, model: nn.Module, batch: dict[str, list]) -> None:
        """Decodes and scores one batch of a memorized set."""
        lengths = [len(suffix) for suffix in batch["suffix"]]
        continuations = self._continue(model, batch["prefix"], lengths)
        self.memorization[name].update(continuations, batch["suffix"])
        self.continuations[name].update(zip(batch["index"], continuations, strict=True))

    def add_questions(self, name: str, model: nn.Module, questions: Sequence[Question], decode: Callable) -> None:
        """Answers and scores some questions; ``decode`` turns token ids into text."""
        lengths = [question.asked.max_new_tokens for question in questions]
        prompts = [question.prompt for question in questions]
        texts = [_decoded(ids, decode, self.end_of_text) for ids in self._continue(model, prompts, lengths)]
        answers = [question.asked.answer_in(text) for question, text in zip(questions, texts, strict=True)]
        self.answers[name].update(answers, [question.answer for question in questions])

    def _continue(self, model: nn.Module, prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return greedy_continuations(model, prefixes, lengths, self.end_of_text)

    def add_text(self, model: nn.Module, batch: TokenBatch) -> None:
        """Scores one batch of held-out text."""
        logits = batch.logits(model)
        ranking = top_tokens(logits)
        self.perplexity.update(logits, batch.targets, batch.valid)
        if self.reference is not None:
            reference = ranking if self.reference == "self" else self.reference[len(self.rankings)].to(ranking)
            self.ndcg.update(ranking, reference, batch.valid)
        self.rankings.append(ranking.to("cpu", torch.int32))

    def results(self) -> dict[str, float | int | None]:
        """All figures under the names of ``results.jsonl``; gathers over ranks, so every rank calls it."""
        figures = {}
        for name, metric in self.memorization.items():
            prefix = "" if name == "memorized" else f"{name}/"
            figures |= {f"{prefix}{key}": value.item() for key, value in metric.compute().items()}
        for name, metric in self.answers.items():
            figures |= {f"{name}/{key}": value.item() for key, value in metric.compute().items()}
        if self.rankings:
            figures["perplexity"] = self.perplexity.compute().item()
            figures["ndcg@10"] = None if self.reference is None else self.ndcg.compute().item()
        return figures


def _decoded(ids: list[int], decode: Callable, end_of_text: Collection[int]) -> str:
    return decode(list(itertools.takewhile(lambda token: token not in end_of_text, ids)))
