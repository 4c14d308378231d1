"""PositionStress: does a shifted or extended prompt bring a suppressed suffix back?"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, SequencesSeen, Setting
from lightning_kfac.metrics.per_sequence import SeveralFigures


class PositionStress(SeveralFigures):
    """Mean recited length of the prefix itself and of its best perturbation, in tokens (arXiv 2510.24256, section 5).

    Figures: ``original_len``, ``stress_len``, ``stress_difference`` (the second less the first),
    ``original_full_match`` and ``stress_full_match`` (shares recited to the end of the gold).

    Example:
        >>> metric = PositionStress()
        >>> metric.update(original=[48, 2], stress=[48, 10], lengths=[48, 48])
        >>> metric.compute()["stress_difference"].item()
        4.0
    """

    labels: ClassVar[dict[str, Label]] = {
        "original_len": Label("tokens recited from the prefix", "{:.1f}", "lower"),
        "stress_len": Label("from the best perturbed prompt", "{:.1f}", "lower"),
        "stress_difference": Label("difference", "{:.1f}", "lower"),
        "original_full_match": Label("recited to the end, prefix", "{:.3f}", "lower"),
        "stress_full_match": Label("recited to the end, perturbed", "{:.3f}", "lower"),
    }
    group = "stress"
    seen = SequencesSeen
    prefix = "stress/"
    higher_is_better = False
    columns = ("original", "stress", "length")

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return cls() if setting.main and setting.measures.position_stress else None

    @override
    def observe(self, seen: SequencesSeen) -> None:
        pairs = seen.stress or []
        lengths = [len(gold) for gold in seen.stressed]
        self.update([a for a, _ in pairs], [b for _, b in pairs], lengths, seen.index)

    @override
    def update(
        self, original: Sequence[int], stress: Sequence[int], lengths: Sequence[int], index: Sequence[int] | None = None
    ) -> None:
        """Adds sequences: recited lengths without and with perturbation, and lengths of the golds."""
        rows = list(zip(original, stress, lengths, strict=True))
        self.add(torch.tensor(rows, dtype=torch.float64).view(-1, 3), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        original, stress, length = values["original"], values["stress"], values["length"]
        one = torch.ones_like(length)
        return {
            "original_len": Figure(original, one),
            "stress_len": Figure(stress, one),
            "stress_difference": Figure(stress - original, one),
            "original_full_match": Figure((original >= length).double(), one, rate=True),
            "stress_full_match": Figure((stress >= length).double(), one, rate=True),
        }
