"""What extraction misses, and what it mistakes: samples that are nearly the sequence, and text that is merely easy."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, SequencesSeen, Setting
from lightning_kfac.metrics.extraction import TRIES
from lightning_kfac.metrics.functional import extracted_in
from lightning_kfac.metrics.per_sequence import SeveralFigures


class NearVerbatim(SeveralFigures):
    """Expected share of the sequences to which one of N samples comes within some token edits, at least.

    Args:
        distance: The edits.
        beams: With which continuations were looked for: more of them raise the bound.

    Example:
        >>> metric = NearVerbatim(2, 16)
        >>> metric.update([math.log(0.5), math.log(0.1)])
        >>> round(metric.compute()["near_verbatim@10"].item(), 3)
        0.825
    """

    labels: ClassVar[dict[str, Label]] = {
        f"near_verbatim@{n}": Label(
            f"nearly verbatim in {n:,} samples, at least", "{:.3f}", "lower", aside=n < TRIES[-1]
        )
        for n in TRIES
    }
    group = "set"
    seen = SequencesSeen
    quiet = True
    higher_is_better = False
    columns = ("log_near",)

    def __init__(self, distance: int, beams: int) -> None:
        super().__init__()
        self.distance = distance
        self.beams = beams

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        asked = setting.measures.extraction
        return cls(asked.near_verbatim, asked.beams) if asked is not None and asked.near_verbatim else None

    @property
    @override
    def settings(self) -> Mapping[str, float | None]:
        return {"near_verbatim_edits": self.distance, "near_verbatim_beams": self.beams}

    @override
    def observe(self, seen: SequencesSeen) -> None:
        if seen.log_near is not None:
            self.update(seen.log_near, seen.index)

    @override
    def update(self, log_near: Sequence[float], index: Sequence[int] | None = None) -> None:
        """Adds sequences: natural logarithms [n] of the probabilities of one sample, and their numbers."""
        self.add(torch.as_tensor(log_near, dtype=torch.float64).view(-1, 1), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        log_near = values["log_near"]
        return {f"near_verbatim@{n}": Figure(extracted_in(log_near, n), torch.ones_like(log_near)) for n in TRIES}


class PriorRatio(SeveralFigures):
    """How much likelier sequences are behind their own prefix than behind another's: the median of the ratios, log10.

    Example:
        >>> metric = PriorRatio()
        >>> metric.update([math.log(1000), math.log(10), 0.0])
        >>> round(metric.compute()["prior_ratio_log10"].item(), 3)
        1.0
    """

    labels: ClassVar[dict[str, Label]] = {
        "prior_ratio_log10": Label("likelier by its own prefix, median log10", "{:.2f}", "lower")
    }
    group = "set"
    seen = SequencesSeen
    quiet = True
    higher_is_better = False
    columns = ("ratio",)

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        asked = setting.measures.extraction
        return cls() if asked is not None and asked.prior_ratio else None

    @override
    def observe(self, seen: SequencesSeen) -> None:
        if seen.prior_ratio is not None:
            self.update(seen.prior_ratio, seen.index)

    @override
    def update(self, ratio: Sequence[float], index: Sequence[int] | None = None) -> None:
        """Adds sequences: natural logarithms [n] of the ratios, see ``prior_ratio``, and their numbers."""
        self.add(torch.as_tensor(ratio, dtype=torch.float64).view(-1, 1), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        ratio = values["ratio"] / math.log(10)
        return {"prior_ratio_log10": Figure(ratio, torch.ones_like(ratio), median=True)}
