"""Instruments: each runs a model over one kind of batch and feeds every metric that has something to say of it."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_kfac.data.loaders import TokenRows
from lightning_kfac.data.names import MEMBERS
from lightning_kfac.data.questions import Question
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.decoding import greedy_continuations
from lightning_kfac.evaluation.leaks import text_scores
from lightning_kfac.evaluation.log import EvaluationLog
from lightning_kfac.evaluation.near_verbatim import near_verbatim
from lightning_kfac.evaluation.recitation import Recital, Recitation, prior_ratios
from lightning_kfac.evaluation.scoring import next_token_scores, position_stress
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import AnswersSeen, Described, SequencesSeen, Setting, TextSeen, TextsScored
from lightning_kfac.metrics.extraction import Extraction
from lightning_kfac.metrics.functional import cut_after_end
from lightning_kfac.metrics.per_sequence import PerSequence
from lightning_kfac.metrics.registry import MEASURED
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.storage.stored_batches import StoredBatches


class Instrument:
    """The metrics of one kind of batch.

    Args:
        kind: What they are fed with.
        setting: What the evaluation is.
        log: What an interrupted evaluation has computed already.
        prefix: Stands before the names of all figures: that of a set, with a slash.

    Attributes:
        metrics: Those that have something to say.
        figures: After ``results``: every figure with the values behind it.
        numbers: After ``results``: int64 [n], the numbers of the sequences or documents behind each figure.
        others: After ``results``: what metrics without a figure give.
        settings: After ``results``: what figures depend on, by the names of ``results.jsonl``.
    """

    def __init__(self, kind: type[object], setting: Setting, log: EvaluationLog, prefix: str = ""):
        self.setting = setting
        self.log = log
        self.prefix = prefix
        asked = [metric.asked(setting) for metric in MEASURED if metric.seen is kind]
        self.metrics = [metric for metric in asked if metric is not None]
        self.figures: dict[str, Figure] = {}
        self.numbers: dict[str, torch.Tensor] = {}
        self.others: dict[type[Metric], torch.Tensor] = {}
        self.settings: dict[str, Any] = {}

    def results(self) -> dict[str, float | int | None]:
        """All figures under the names of ``results.jsonl``; gathers over ranks, so every rank calls it."""
        results: dict[str, float | int | None] = {}
        for metric in self.metrics:
            results |= self._of(metric)
        return results

    def _of(self, metric: Described) -> dict[str, float | int | None]:
        result = metric.compute()
        if not metric.labels:
            self.others[type(metric)] = result
            return {}
        # A metric of one figure gives that alone.
        values: Mapping[str, torch.Tensor] = (
            result if isinstance(result, Mapping) else dict.fromkeys(metric.labels, result)
        )
        prefix = self.prefix + metric.prefix
        if isinstance(metric, PerSequence):
            found = {f"{prefix}{name}": figure for name, figure in metric.figures.items() if len(figure.sums)}
            self.figures |= found
            self.numbers |= dict.fromkeys(found, metric.numbers)
            if metric.quiet and not len(metric.numbers):
                return {}
        self.settings |= {f"{prefix}{name}": value for name, value in metric.settings.items()}
        return {f"{prefix}{name}": _plain(value.item()) for name, value in values.items()}

    def _observe(self, seen: object) -> None:
        for metric in self.metrics:
            metric.observe(seen)


class Sequences(Instrument):
    """A memorized set: recited, or continued greedily.

    What is not recited is decoded in full batches, so that the figures of a batch may be known only some batches later.

    Args:
        name: Of the set, in the log.
        before: The same set under the unedited model, where there is one.

    Attributes:
        continuations: Sequence number -> continuation (of this rank).
        recited: Numbers of the sequences that are recited (of this rank).
        curve: After ``results``: expected share extracted in each number of tries of ``CURVE``; empty if not measured.
    """

    def __init__(self, name: str, setting: Setting, log: EvaluationLog, prefix: str, before: "Sequences | None"):
        super().__init__(SequencesSeen, setting, log, prefix)
        self.name = name
        self.before = before
        self.continuations: dict[int, list[int]] = {}
        self.recited: set[int] = set()
        self._recitation: Recitation | None = None
        self._read: deque[Mapping[str, list[Any]]] = deque()  # batches whose recitals are not complete

    @property
    def curve(self) -> list[float]:
        """See the attributes."""
        return next((metric.curve for metric in self.metrics if isinstance(metric, Extraction)), [])

    def add(self, model: nn.Module, batch: Mapping[str, list[Any]]) -> None:
        """Takes one batch; decodes only what is not recited."""
        if self.log.knows(self._entry(batch)):
            self._score(model, batch, [])
            return
        if self._recitation is None:
            self._recitation = Recitation(model, self.setting.end_of_text, self.setting.measures.extraction)
        self._read.append(batch)
        for recitals in self._recitation.add(batch["prefix"], batch["suffix"]):
            self._score(model, self._read.popleft(), recitals)

    def finish(self) -> None:
        """Scores what was taken and waits."""
        if self._recitation is None:
            return
        for recitals in self._recitation.finish():
            self._score(self._recitation.model, self._read.popleft(), recitals)
        self._recitation = None

    @override
    def results(self) -> dict[str, float | int | None]:
        """As of ``Instrument``."""
        self.finish()
        return super().results()

    def _entry(self, batch: Mapping[str, list[Any]]) -> str:
        return f"recited {self.name} {batch['index']}"

    def _score(self, model: nn.Module, batch: Mapping[str, list[Any]], recitals: list[Recital]) -> None:
        """Scores one batch; recitals that the log knows need not be given."""
        index = batch["index"]
        prefixes = batch["prefix"]
        golds = batch["suffix"]
        end_of_text = self.setting.end_of_text
        recitals = [Recital(*recital) for recital in self.log.once(self._entry(batch), lambda: recitals)]
        log_p = None
        if self.setting.measures.extraction is not None:
            log_p = [recital.log_p for recital in recitals if recital.log_p is not None]
        self.continuations |= {i: recital.decoded for i, recital in zip(index, recitals, strict=True)}
        self.recited |= {i for i, recital in zip(index, recitals, strict=True) if recital.strict}
        before: dict[int, list[int]] = {}
        if self.before is not None:
            before = {i: self.before.continuations[i] for i in index if i not in self.before.recited}
        stressed = [list(cut_after_end(gold, end_of_text)) for gold in golds]
        self._observe(
            SequencesSeen(
                index,
                golds,
                [recital.decoded for recital in recitals],
                [recital.near_tie for recital in recitals],
                before,
                self._stress(model, index, prefixes, stressed),
                stressed,
                log_p,
                self._near(model, index, prefixes, golds, log_p),
                self._prior_ratio(model, batch),
            )
        )

    def _near(
        self,
        model: nn.Module,
        index: list[int],
        prefixes: list[list[int]],
        golds: list[list[int]],
        log_p: list[float] | None,
    ) -> list[float] | None:
        asked = self.setting.measures.extraction
        if asked is None or log_p is None or not asked.near_verbatim:
            return None
        how = asked, asked.near_verbatim, asked.beams, self.setting.end_of_text
        return self.log.once(f"near {self.name} {index}", lambda: near_verbatim(model, prefixes, golds, log_p, *how))

    def _prior_ratio(self, model: nn.Module, batch: Mapping[str, list[Any]]) -> list[float] | None:
        asked = self.setting.measures.extraction
        if asked is None or not asked.prior_ratio:
            return None
        if batch["unrelated"] == batch["prefix"] != []:
            raise InputError(f"extraction.prior_ratio: {self.name} has one sequence, and needs the prefix of another")
        return self.log.once(
            f"prior {self.name} {batch['index']}",
            lambda: prior_ratios(
                model, batch["prefix"], batch["unrelated"], batch["suffix"], asked.whole, self.setting.end_of_text
            ),
        )

    def _stress(
        self, model: nn.Module, index: list[int], prefixes: list[list[int]], golds: list[list[int]]
    ) -> list[tuple[int, int]] | None:
        measures = self.setting.measures
        t = measures.position_stress
        if not (self.setting.main and t):
            return None
        if not prefixes:
            return self.log.once(f"stress {index}", list)
        return self.log.once(
            f"stress {index}", lambda: position_stress(model, prefixes, golds, t, measures.include_unperturbed)
        )


class Questions(Instrument):
    """A set of questions, answered greedily."""

    def __init__(self, name: str, setting: Setting, log: EvaluationLog, prefix: str):
        super().__init__(AnswersSeen, setting, log, prefix)
        self.name = name

    def add(
        self,
        model: nn.Module,
        questions: Sequence[Question],
        index: Sequence[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        """Answers and scores some questions; ``decode`` turns token ids into text."""
        lengths = [question.asked.max_new_tokens for question in questions]
        prompts = [question.prompt for question in questions]
        end_of_text = self.setting.end_of_text
        written = self.log.once(
            f"answered {self.name} {index}", lambda: greedy_continuations(model, prompts, lengths, end_of_text)
        )
        texts = [_decoded(ids, decode, end_of_text) for ids in written]
        answers = [question.asked.answer_in(text) for question, text in zip(questions, texts, strict=True)]
        self._observe(AnswersSeen(index, answers, [question.answer for question in questions]))


class Members(Instrument):
    """Texts that the model was trained on, and others: each is scored by itself.

    Attributes:
        classes: Names of those that were added.
    """

    def __init__(self, setting: Setting, log: EvaluationLog):
        super().__init__(TextsScored, setting, log)
        self.classes: set[str] = set()

    def add(
        self,
        name: str,
        model: nn.Module,
        batch: Mapping[str, list[Any]],
        decode: Callable[[list[int]], str] | None,
        reference_losses: Mapping[int, float] | None = None,
        bulk: BulkShare | None = None,
    ) -> None:
        """Scores one batch of a class.

        Args:
            name: ``members`` or ``nonmembers``.
            decode: Turns token ids into text.
            reference_losses: By the reference model, by number.
            bulk: Listens to layers of the model.
        """
        self.classes.add(name)
        index = batch["index"]
        losses = None if reference_losses is None else [reference_losses[i] for i in index]
        k = self.setting.measures.leaks.k

        def score() -> list[dict[str, float]]:
            texts = batch["prefix"], batch["suffix"]
            return text_scores(model, *texts, k=k, decode=decode, reference_losses=losses, bulk=bulk)

        self._observe(TextsScored(index, name == MEMBERS, self.log.once(f"scored {name} {index}", score)))


class Text(Instrument):
    """Held-out text: losses and rankings of next tokens.

    Args:
        before: The same text under the unedited model; ``self`` where this is it.
        rows: The rows that batches are made of, where they know their documents.

    Attributes:
        rankings, losses: Top tokens and token losses of each batch (of this rank).
    """

    def __init__(
        self,
        setting: Setting,
        log: EvaluationLog,
        before: "Text | Literal['self'] | None",
        rows: TokenRows | None = None,
    ):
        super().__init__(TextSeen, setting, log)
        self.before = before
        self.rows = rows
        self.rankings = StoredBatches(torch.int32)
        self.losses = StoredBatches(torch.float32)

    def add(self, model: nn.Module, batch: TokenBatch) -> None:
        """Scores one batch."""
        number = len(self.rankings)
        scores = self.log.tensors_once(f"text {number}", lambda: next_token_scores(model, batch))
        losses, ranking = (tensor.to(batch.input_ids.device) for tensor in scores)
        reference = ranking if self.before == "self" else None
        before = None
        if isinstance(self.before, Text):
            reference = self.before.rankings[number].to(ranking)
            before = self.before.losses[number].to(losses.device)
        documents = None
        if self.rows is not None:
            documents = self.rows.documents_of_targets(batch.sample_index, batch.shape[1])
        self._observe(TextSeen(batch.sample_index, batch.valid, losses, ranking, reference, before, documents))
        self.rankings.append(ranking)
        self.losses.append(losses)


def _plain(value: float) -> float | None:
    """As JSON has it: a logarithm of nothing is null."""
    return None if value == -math.inf else value


def _decoded(ids: list[int], decode: Callable[[list[int]], str], end_of_text: Collection[int]) -> str:
    return decode(list(itertools.takewhile(lambda token: token not in end_of_text, ids)))
