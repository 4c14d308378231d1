"""Memorization: does the model recite the sequences it saw in training?"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, SequencesSeen, Setting
from lightning_kfac.metrics.functional import LOOSE_SIMILARITY, recitation
from lightning_kfac.metrics.per_sequence import SeveralFigures


class Memorization(SeveralFigures):
    """Strict and loose accuracy and mean normalised Levenshtein distance of greedy continuations.

    Args:
        end_of_text: Ids at which a gold suffix and a continuation end.
        loose_similarity: Least share of a gold suffix that a loose recitation repeats.

    Example:
        >>> metric = Memorization()
        >>> metric.update([[1, 2, 3, 9], [5, 6]], [[1, 2, 3, 4], [5, 6]])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'strict_acc': 0.5, 'loose_acc': 1.0, 'avg_levenshtein_norm': 0.125, 'n_sequences': 2, 'n_near_ties': 0}
    """

    labels: ClassVar[dict[str, Label]] = {
        "strict_acc": Label(
            "strict accuracy",
            "{:.3f}",
            "lower",
            short="strict",
            panel="rates",
            meaning="share of the sequences that greedy decoding recites word for word",
        ),
        "loose_acc": Label(
            "loose accuracy",
            "{:.3f}",
            "lower",
            panel="rates",
            meaning="share recited but for a few tokens (25 % of them, if nothing else is asked for)",
        ),
        "avg_levenshtein_norm": Label(
            "normalised Levenshtein",
            "{:.3f}",
            "higher",
            panel="rates",
            meaning="edits from the true continuation, a token (0: recited, 1: nothing in common)",
        ),
    }
    group = "set"
    seen = SequencesSeen
    higher_is_better = False
    columns = ("strict", "loose", "levenshtein", "near_tie")
    counted = "n_sequences"

    def __init__(
        self, end_of_text: Collection[int] = frozenset(), loose_similarity: float = LOOSE_SIMILARITY, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.end_of_text = frozenset(end_of_text)
        self.loose_similarity = loose_similarity
        self.near_ties = torch.empty(0, dtype=torch.float64)

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self:
        return cls(setting.end_of_text, setting.measures.loose_similarity)

    @override
    def observe(self, seen: SequencesSeen) -> None:
        self.update(seen.continuations, seen.golds, seen.index, seen.near_ties)

    @override
    def update(
        self,
        continuations: Sequence[Sequence[int]],
        golds: Sequence[Sequence[int]],
        index: Sequence[int] | None = None,
        near_ties: Sequence[bool] | None = None,
    ) -> None:
        """Adds one continuation and one gold suffix per sequence.

        Args:
            index: Numbers of the sequences.
            near_ties: Whose verdict hangs on logits that are equal within the model's precision.
        """
        verdicts = [
            recitation(continuation, gold, self.end_of_text, self.loose_similarity)
            for continuation, gold in zip(continuations, golds, strict=True)
        ]
        rows = [(*v, near) for v, near in zip(verdicts, near_ties or [False] * len(verdicts), strict=True)]
        self.add(torch.tensor(rows, dtype=torch.float64).view(-1, 4), index)

    @override
    def compute(self) -> dict[str, Tensor]:
        return super().compute() | {"n_near_ties": self.near_ties.sum().long()}

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        self.near_ties = values["near_tie"]
        one = torch.ones_like(values["strict"])
        return {
            "strict_acc": Figure(values["strict"], one, rate=True),
            "loose_acc": Figure(values["loose"], one, rate=True),
            "avg_levenshtein_norm": Figure(values["levenshtein"], one),
        }
