"""One evaluation of a model: recitation of memorized sets, answers, perplexity and nDCG on held-out text."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.data.questions import Question
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.decoding import greedy_continuations
from lightning_kfac.evaluation.log import EvaluationLog, NoLog
from lightning_kfac.evaluation.recitation import Recital, recite
from lightning_kfac.evaluation.scoring import next_token_scores, position_stress
from lightning_kfac.math.statistics import Figure, interval, paired_difference
from lightning_kfac.metrics import (
    NDCG,
    BatchMeanPerplexity,
    ContinuationShift,
    ExactAnswer,
    LossChange,
    Memorization,
    PositionStress,
)
from lightning_kfac.metrics.functional import LOOSE_SIMILARITY, cut_after_end
from lightning_kfac.metrics.per_sequence import PerSequence
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.probes import is_plain_head
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.storage.stored_batches import StoredBatches


@dataclass(frozen=True)
class Measures:
    """What an evaluation measures beside the ordinary.

    Args:
        loose_similarity: Least similarity (1 - Levenshtein / length) of a loose recitation.
        position_stress: The t of the position stress of the set ``memorized`` (the paper's is 20); 0 leaves it out.
        include_unperturbed: Let the prefix itself count among the prompts of the position stress.
        batch_mean_perplexity: Also average exp(batch loss) as the original script does; depends on the batch size.
    """

    loose_similarity: float = LOOSE_SIMILARITY
    position_stress: int = 0
    include_unperturbed: bool = False
    batch_mean_perplexity: bool = False

    def __post_init__(self):
        if not 0 <= self.loose_similarity <= 1:
            raise InputError(f"measures.loose_similarity is {self.loose_similarity}; it must lie between 0 and 1")
        if self.position_stress < 0:
            raise InputError(f"measures.position_stress is {self.position_stress}; it must not be negative")


class Evaluation:
    """Metrics of one evaluation, fed batch by batch.

    Args:
        sets: Names of the memorized sets. Metrics of ``memorized`` carry no prefix, others their name.
        questions: Names of the question sets; their metrics carry them as a prefix.
        end_of_text: Ids at which a continuation ends.
        baseline: The evaluation of the unedited model over the same batches, or ``self`` if this is it; None
            measures no nDCG and no differences.
        measures: What else to measure.
        log: What an interrupted evaluation has computed already.

    Attributes:
        rankings, losses: Top tokens and token losses of each held-out batch (of this rank).
        change_counts: After ``results``: histogram of token losses against the baseline's, as ``LossChange`` counts.
        continuations: Per set, sequence number -> continuation (of this rank).
        recited: Per set, the numbers of the sequences that are recited (of this rank).
        figures: After ``results``: every figure with the values behind it.
    """

    def __init__(
        self,
        sets: Iterable[str],
        questions: Iterable[str],
        end_of_text: Collection[int],
        baseline: "Evaluation | str | None",
        measures: Measures = Measures(),
        log: EvaluationLog | None = None,
    ):
        self.log = log or NoLog()
        sets, self.measures, self.end_of_text, self.baseline = list(sets), measures, end_of_text, baseline
        self.memorization = nn.ModuleDict({name: Memorization(end_of_text, measures.loose_similarity) for name in sets})
        self.shift = nn.ModuleDict({name: ContinuationShift() for name in sets})
        self.answers = nn.ModuleDict({name: ExactAnswer() for name in questions})
        self.perplexity, self.ndcg, self.batch_mean = LossPerplexity(), NDCG(), BatchMeanPerplexity()
        self.stress, self.loss_change = PositionStress(), LossChange()
        self._head_alone: bool | None = None
        self.rankings, self.losses = StoredBatches(torch.int32), StoredBatches(torch.float32)
        self.continuations: dict[str, dict[int, list[int]]] = {name: {} for name in sets}
        self.recited: dict[str, set[int]] = {name: set() for name in sets}
        self.figures: dict[str, Figure] = {}
        self.change_counts: list[int] | None = None

    def to(self, device: torch.device) -> "Evaluation":
        """The metrics on another device."""
        by_name = self.memorization, self.shift, self.answers
        for metric in (*by_name, self.perplexity, self.batch_mean, self.ndcg, self.stress, self.loss_change):
            metric.to(device)
        return self

    def add_sequences(self, name: str, model: nn.Module, batch: dict[str, list]) -> None:
        """Scores one batch of a memorized set; decodes only what is not recited."""
        index, prefixes, golds = batch["index"], batch["prefix"], batch["suffix"]
        found = self.log.once(f"recited {name} {index}", lambda: recite(model, prefixes, golds, self.end_of_text))
        recitals = [Recital(*recital) for recital in found]
        continuations = dict(zip(index, (r.continuation for r in recitals), strict=True))
        near_ties = [recital.near_tie for recital in recitals]
        self.memorization[name].update(list(continuations.values()), golds, index, near_ties)
        self.continuations[name] |= continuations
        self.recited[name] |= {i for i, recital in zip(index, recitals, strict=True) if recital.strict}
        if isinstance(self.baseline, Evaluation):
            others = [i for i in index if i not in self.baseline.recited[name]]
            before = [self.baseline.continuations[name][i] for i in others]
            self.shift[name].update(before, [continuations[i] for i in others], others)
        if name == MEMORIZED and self.measures.position_stress:
            golds = [list(cut_after_end(gold, self.end_of_text)) for gold in golds]
            t, unperturbed = self.measures.position_stress, self.measures.include_unperturbed
            pairs = self.log.once(
                f"stress {index}", lambda: position_stress(model, prefixes, golds, t, unperturbed) if prefixes else []
            )
            self.stress.update([a for a, _ in pairs], [b for _, b in pairs], [len(gold) for gold in golds], index)

    def add_questions(
        self, name: str, model: nn.Module, questions: Sequence[Question], index: Sequence[int], decode: Callable
    ) -> None:
        """Answers and scores some questions; ``decode`` turns token ids into text."""
        lengths = [question.asked.max_new_tokens for question in questions]
        prompts = [question.prompt for question in questions]
        written = self.log.once(
            f"answered {name} {index}", lambda: greedy_continuations(model, prompts, lengths, self.end_of_text)
        )
        texts = [_decoded(ids, decode, self.end_of_text) for ids in written]
        answers = [question.asked.answer_in(text) for question, text in zip(questions, texts, strict=True)]
        self.answers[name].update(answers, [question.answer for question in questions], index)

    def add_text(self, model: nn.Module, batch: TokenBatch) -> None:
        """Scores one batch of held-out text."""
        self._head_alone = is_plain_head(model) if self._head_alone is None else self._head_alone
        scores = self.log.tensors_once(
            f"text {len(self.rankings)}", lambda: next_token_scores(model, batch, head_alone=self._head_alone)
        )
        losses, ranking = (tensor.to(batch.input_ids.device) for tensor in scores)
        self.perplexity.update(losses, batch.valid, batch.sample_index)
        self.batch_mean.update(losses, batch.valid)
        if self.baseline is not None:
            reference = ranking if self.baseline == "self" else self.baseline.rankings[len(self.rankings)].to(ranking)
            self.ndcg.update(ranking, reference, batch.valid, batch.sample_index)
        if isinstance(self.baseline, Evaluation):
            before = self.baseline.losses[len(self.losses)].to(losses.device)
            self.loss_change.update(before, losses.float(), batch.valid)
        self.rankings.append(ranking)
        self.losses.append(losses)

    def results(self) -> dict[str, float | int | None]:
        """All figures under the names of ``results.jsonl``; gathers over ranks, so every rank calls it."""
        results: dict[str, float | int | None] = {}
        for name, metric in self.memorization.items():
            prefix = "" if name == MEMORIZED else f"{name}/"
            results |= self._compute(metric, prefix)
            if isinstance(self.baseline, Evaluation):
                shift = self._compute(self.shift[name], prefix)
                results |= shift if shift[f"{prefix}n_not_recited"] else {}
        if self.measures.position_stress and MEMORIZED in self.memorization:
            results |= self._compute(self.stress, "stress/")
        for name, metric in self.answers.items():
            results |= self._compute(metric, f"{name}/")
        if len(self.rankings):
            results |= self._compute(self.perplexity, "")
            if self.measures.batch_mean_perplexity:
                results["perplexity_batch_mean"] = self.batch_mean.compute().item()
            if isinstance(self.baseline, Evaluation):
                self.change_counts = self.loss_change.compute().tolist()
            results |= {"ndcg@10": None} if self.baseline is None else self._compute(self.ndcg, "")
        return results

    def intervals(self) -> dict[str, list[float | None]]:
        """95 % interval [low, high] of every figure, after ``results``."""
        return {name: _finite(interval(figure)) for name, figure in self.figures.items()}

    def differences(self) -> dict[str, list[float | None]]:
        """[difference from the baseline, low, high] of every figure that both have, after ``results``."""
        if not isinstance(self.baseline, Evaluation):
            return {}
        before: Mapping[str, Figure] = self.baseline.figures
        return {name: _finite(paired_difference(before[name], f)) for name, f in self.figures.items() if name in before}

    def _compute(self, metric: PerSequence, prefix: str) -> dict[str, float | int]:
        values = metric.compute()
        if not isinstance(values, Mapping):  # a metric of one figure
            values = dict.fromkeys(metric.figures, values)
        self.figures |= {f"{prefix}{name}": figure for name, figure in metric.figures.items() if len(figure.sums)}
        return {f"{prefix}{name}": value.item() for name, value in values.items()}


def _finite(numbers: Iterable[float]) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers]


def _decoded(ids: list[int], decode: Callable, end_of_text: Collection[int]) -> str:
    return decode(list(itertools.takewhile(lambda token: token not in end_of_text, ids)))
