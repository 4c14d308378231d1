"""ContinuationShift: how far does an edit move continuations that were no recitation?"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, SequencesSeen, Setting
from lightning_kfac.metrics.per_sequence import SeveralFigures


class ContinuationShift(SeveralFigures):
    """Edit distance between the continuations of two models, for prefixes that the first one does not recite.

    Figures: ``shift_levenshtein_norm`` (mean distance over the longer length, in tokens) and ``unchanged`` (share of
    equal continuations).

    Example:
        >>> metric = ContinuationShift()
        >>> metric.update([[1, 2, 3, 4], [5, 6]], [[1, 2, 3, 9], [5, 6]])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'shift_levenshtein_norm': 0.125, 'unchanged': 0.5, 'n_not_recited': 2}
    """

    labels: ClassVar[dict[str, Label]] = {
        "unchanged": Label(
            "continued as before",
            "{:.3f}",
            "higher",
            counter="n_not_recited",
            meaning="of what the unedited model does not recite, the share that goes on word for word as it did",
        ),
        "shift_levenshtein_norm": Label(
            "how far the continuation moved",
            "{:.3f}",
            "lower",
            counter="n_not_recited",
            meaning="edits from the unedited model's continuation, a token (0: as it was, 1: nothing in common)",
        ),
    }
    group = "set"
    seen = SequencesSeen
    quiet = True
    columns = ("distance", "unchanged")
    counted = "n_not_recited"

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return cls() if setting.compared else None

    @override
    def observe(self, seen: SequencesSeen) -> None:
        after = dict(zip(seen.index, seen.continuations, strict=True))
        self.update(list(seen.before.values()), [after[i] for i in seen.before], list(seen.before))

    @override
    def update(
        self, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], index: Sequence[int] | None = None
    ) -> None:
        """Adds pairs of continuations, and the numbers of their sequences."""
        pairs = [
            (Levenshtein.distance(a, b) / max(len(a), len(b), 1), list(a) == list(b))
            for a, b in zip(before, after, strict=True)
        ]
        self.add(torch.tensor(pairs, dtype=torch.float64).view(-1, 2), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        one = torch.ones_like(values["distance"])
        return {
            "shift_levenshtein_norm": Figure(values["distance"], one),
            "unchanged": Figure(values["unchanged"], one, rate=True),
        }
