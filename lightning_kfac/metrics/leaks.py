"""Membership: can texts that a model was trained on be told from others?"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.separation import FPR, auc_interval, tpr_at_fpr
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, Setting, TextsScored
from lightning_kfac.metrics.functional import Leaks
from lightning_kfac.metrics.per_sequence import SeveralFigures

OBJECT = "leaks"
TPR = f"tpr_at_fpr_{FPR:g}"


class Measure(NamedTuple):
    """A score of one text.

    Attributes:
        title: In tables.
        sign: 1 where members have a higher one, -1 where they have a lower one.
    """

    title: str
    sign: int


SCORES = {
    "loss": Measure("loss", -1),
    "zlib": Measure("loss / zlib", -1),
    "reference": Measure("loss against the reference", -1),
    "min_k": Measure("Min-K", 1),
    "min_k_plus_plus": Measure("Min-K++", 1),
    "exact_match": Measure("exact match", 1),
    "extraction_strength": Measure("extraction strength", 1),
}


def _labels() -> dict[str, Label]:
    labels = {}
    for name, measure in SCORES.items():
        short = "loss AUC" if name == "loss" else None
        title = f"{measure.title}: AUC of members"
        labels[f"{OBJECT}.{name}.auc"] = Label(title, "{:.3f}", "lower", short=short, aside=True)
        title = f"{measure.title}: members found at {FPR:.0%} false alarms"
        labels[f"{OBJECT}.{name}.{TPR}"] = Label(title, "{:.3f}", "lower", aside=True)
    return labels


class Membership(SeveralFigures):
    """How well scores of texts tell members, which a model was trained on, from texts that it was not.

    Figures: ``leaks.MEASURE.auc`` (chance that a member scores above a non-member; 0.5 tells nothing) and
    ``leaks.MEASURE.tpr_at_fpr_0.01`` (share of members found at a threshold that 1 % of the non-members reach), for
    each measure of ``SCORES`` that was given. ``settings`` has the bounds and means of each, after ``compute``.

    Args:
        leaks: Settings of the measures, to stand beside the figures.

    Example:
        >>> metric = Membership()
        >>> metric.update([{"loss": 1.0}, {"loss": 3.0}], member=True)
        >>> metric.update([{"loss": 2.0}, {"loss": 4.0}], member=False)
        >>> metric.compute()["leaks.loss.auc"].item()
        0.75
    """

    labels: ClassVar[dict[str, Label]] = _labels()
    seen = TextsScored
    quiet = True
    higher_is_better = False
    columns = ("member", *SCORES)

    def __init__(self, leaks: Leaks | None = None) -> None:
        super().__init__()
        self.leaks = leaks or Leaks()
        self.beside: dict[str, float | None] = {}

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self:
        return cls(setting.measures.leaks)

    @property
    @override
    def settings(self) -> Mapping[str, float | None]:
        return self.beside

    @override
    def observe(self, seen: TextsScored) -> None:
        self.update(seen.scores, seen.member, seen.index)

    @override
    def update(self, scores: Sequence[Mapping[str, float]], member: bool, index: Sequence[int] | None = None) -> None:
        """Adds texts.

        Args:
            scores: Of each text, by the names of ``SCORES``; every text has the same ones.
            member: Whether the model was trained on them.
            index: Their numbers in their class.
        """
        rows = [[float(member), *(score.get(name, math.nan) for name in SCORES)] for score in scores]
        values = torch.tensor(rows, dtype=torch.float64).view(-1, len(self.columns))
        if index is None:
            before = sum(int((part[:, 0] == member).sum()) for part in self.values)
            index = range(before, before + len(rows))
        # Non-members have negative numbers, so that no two texts have the same one.
        self.add(values, [number if member else -1 - number for number in index])

    @override
    def compute(self) -> dict[str, Tensor]:
        found = super().compute()
        self.beside = {}
        for key, figure in self.figures.items():
            name = key.split(".")[1]
            members, others = figure.classes
            self.beside |= {f"{OBJECT}.members": len(members), f"{OBJECT}.nonmembers": len(others)}
            self.beside |= {f"{OBJECT}.k": self.leaks.k}
            both = bool(len(members) and len(others))
            rate = tpr_at_fpr(members, others) if both else math.nan
            found[f"{OBJECT}.{name}.{TPR}"] = torch.tensor(rate, dtype=torch.float64)
            bounds = auc_interval(members, others) if both else (math.nan, math.nan)
            means = [SCORES[name].sign * part.mean() if len(part) else math.nan for part in (members, others)]
            for what, value in zip(("low", "high", "mean_members", "mean_nonmembers"), (*bounds, *means), strict=True):
                self.beside[f"{OBJECT}.{name}.{what}"] = float(value)
        return found

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        measured = [name for name in SCORES if not values[name].isnan().all()]
        return {
            f"{OBJECT}.{name}.auc": Figure(SCORES[name].sign * values[name], values["member"], auc=True)
            for name in measured
        }
