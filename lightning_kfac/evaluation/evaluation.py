"""One evaluation of a model: recitation of memorized sets, answers, perplexity and nDCG on held-out text."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_kfac.data.loaders import TokenRows
from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.data.questions import Question
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.instruments import Instrument, Members, Questions, Sequences, Text
from lightning_kfac.evaluation.log import EvaluationLog, NoLog
from lightning_kfac.math.statistics import Figure, interval, paired_difference
from lightning_kfac.metrics.described import Measures, Setting
from lightning_kfac.metrics.loss_change import LossChange
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.storage.stored_batches import StoredBatches


class Evaluation:
    """The instruments of one evaluation, fed batch by batch.

    Args:
        sets: Names of the memorized sets. Metrics of ``memorized`` carry no prefix, others their name.
        questions: Names of the question sets; their metrics carry them as a prefix.
        end_of_text: Ids at which a continuation ends.
        baseline: The evaluation of the unedited model over the same batches, or ``self`` if this is it; None
            measures no nDCG and no differences.
        measures: What else to measure.
        log: What an interrupted evaluation has computed already.
        rows: The rows of the held-out text, where they know their documents; else each row is taken for one.
        bulk: Listens to layers of the model while it reads members and non-members.

    Attributes:
        change_counts: After ``results``: histogram of token losses against the baseline's, as ``LossChange`` counts.
        figures: After ``results``: every figure with the values behind it.
        numbers: After ``results``: the numbers of the sequences or documents behind each figure.
        settings: After ``results``: what figures depend on, by the names of ``results.jsonl``.
    """

    def __init__(
        self,
        sets: Iterable[str],
        questions: Iterable[str],
        end_of_text: Collection[int],
        baseline: "Evaluation | str | None",
        measures: Measures | None = None,
        log: EvaluationLog | None = None,
        rows: TokenRows | None = None,
        bulk: BulkShare | None = None,
    ):
        log = log or NoLog()
        before = baseline if isinstance(baseline, Evaluation) else None
        setting = Setting(measures or Measures(), end_of_text, compared=before is not None, ranked=baseline is not None)
        self.baseline = before
        self.is_ranked = setting.ranked
        self.sets: dict[str, Sequences] = {
            name: Sequences(
                name,
                setting._replace(main=name == MEMORIZED),
                log,
                "" if name == MEMORIZED else f"{name}/",
                None if before is None else before.sets[name],
            )
            for name in sets
        }
        self.questions = {name: Questions(name, setting, log, f"{name}/") for name in questions}
        self.bulk = bulk
        self.members = Members(setting._replace(layers=() if bulk is None else tuple(bulk.layers)), log)
        unedited = None if before is None else before.text
        self.text: Text = Text(setting, log, "self" if baseline == "self" else unedited, rows)
        self.figures: dict[str, Figure] = {}
        self.numbers: dict[str, torch.Tensor] = {}
        self.settings: dict[str, Any] = {}
        self.change_counts: list[int] | None = None

    @property
    def continuations(self) -> dict[str, dict[int, list[int]]]:
        """Per set, sequence number -> continuation (of this rank)."""
        return {name: instrument.continuations for name, instrument in self.sets.items()}

    @property
    def recited(self) -> dict[str, set[int]]:
        """Per set, the numbers of the sequences that are recited (of this rank)."""
        return {name: instrument.recited for name, instrument in self.sets.items()}

    @property
    def curves(self) -> dict[str, list[float]]:
        """Per set where extraction was measured, after ``results``: expected shares extracted in ``CURVE`` tries."""
        return {name: instrument.curve for name, instrument in self.sets.items() if instrument.curve}

    @property
    def losses(self) -> StoredBatches:
        """Token losses of each held-out batch (of this rank)."""
        return self.text.losses

    def to(self, device: torch.device) -> "Evaluation":
        """The metrics on another device."""
        for instrument in (*self.sets.values(), *self.questions.values(), self.members, self.text):
            for metric in instrument.metrics:
                metric.to(device)
        return self

    def add_sequences(self, name: str, model: nn.Module, batch: Mapping[str, list[Any]]) -> None:
        """Takes one batch of a memorized set."""
        self.sets[name].add(model, batch)

    def finish_sequences(self, name: str) -> None:
        """Scores what was taken of a memorized set and waits to be decoded; ``results`` does it for all of them."""
        self.sets[name].finish()

    def add_questions(
        self,
        name: str,
        model: nn.Module,
        questions: Sequence[Question],
        index: Sequence[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        """Answers and scores some questions; ``decode`` turns token ids into text."""
        self.questions[name].add(model, questions, index, decode)

    def add_members(
        self,
        name: str,
        model: nn.Module,
        batch: Mapping[str, list[Any]],
        decode: Callable[[list[int]], str] | None,
        reference_losses: Mapping[int, float] | None = None,
    ) -> None:
        """Scores one batch of ``members`` or ``nonmembers``; see ``Members.add``."""
        self.members.add(name, model, batch, decode, reference_losses, self.bulk)

    def add_text(self, model: nn.Module, batch: TokenBatch) -> None:
        """Scores one batch of held-out text."""
        self.text.add(model, batch)

    def results(self) -> dict[str, float | int | None]:
        """All figures under the names of ``results.jsonl``; gathers over ranks, so every rank calls it."""
        results: dict[str, float | int | None] = {}
        for instrument in self._instruments():
            results |= instrument.results()
            self.figures |= instrument.figures
            self.numbers |= instrument.numbers
            self.settings |= instrument.settings
        if len(self.text.rankings):
            if not self.is_ranked:
                results["ndcg@10"] = None
            changes = self.text.others.get(LossChange)
            self.change_counts = None if changes is None else changes.tolist()
        return results

    def _instruments(self) -> list[Instrument]:
        text = [self.text] if len(self.text.rankings) else []
        members = [self.members] if self.members.classes else []
        return [*self.sets.values(), *self.questions.values(), *members, *text]

    def intervals(self) -> dict[str, list[float | None]]:
        """95 % interval [low, high] of every figure, after ``results``."""
        return {name: _finite(interval(figure)) for name, figure in self.figures.items()}

    def differences(self) -> dict[str, list[float | None]]:
        """[difference from the baseline, low, high] of every figure that both have, after ``results``."""
        if self.baseline is None:
            return {}
        before = self.baseline.figures
        return {name: _finite(paired_difference(before[name], f)) for name, f in self.figures.items() if name in before}


def _finite(numbers: Iterable[float]) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers]
