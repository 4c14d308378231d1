"""nDCG@k: how well a model keeps the next-token ranking of a reference model."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, Setting, TextSeen
from lightning_kfac.metrics.functional import ndcg
from lightning_kfac.metrics.per_sequence import OneFigure


class NDCG(OneFigure):
    """Mean nDCG@10 over valid positions, in float64.

    Example:
        >>> import torch
        >>> metric = NDCG()
        >>> ranking = torch.arange(10).repeat(1, 3, 1)
        >>> metric.update(ranking, ranking, torch.ones(1, 3, dtype=torch.bool))
        >>> metric.compute().item()
        1.0
    """

    labels: ClassVar[dict[str, Label]] = {
        "ndcg@10": Label(
            "nDCG@10 against the unedited",
            "{:.4f}",
            "higher",
            short="nDCG@10",
            panel="own",
            meaning="how far the ten likeliest next tokens are ranked as the unedited model ranks them (1: the same)",
        )
    }
    seen = TextSeen
    higher_is_better = True
    columns = ("gain", "count")

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return cls() if setting.ranked else None

    @override
    def observe(self, seen: TextSeen) -> None:
        if seen.reference is None:
            raise RuntimeError("nDCG needs the rankings of a reference model: see Setting.ranked")
        self.update(seen.ranking, seen.reference, seen.valid, seen.index, seen.documents)

    @override
    def update(
        self,
        ranking: Tensor,
        reference: Tensor,
        valid: Tensor,
        index: Sequence[int] | Tensor | None = None,
        documents: Tensor | None = None,
    ) -> None:
        """Adds a batch of top tokens (see ``top_tokens``): int64 [B, T, k] twice, valid bool [B, T], row numbers, and
        int64 [B, T] numbers of the targets' documents.
        """
        self.add_tokens(ndcg(ranking, reference), valid, index, documents)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        return {"ndcg@10": Figure(values["gain"], values["count"])}
