"""Perplexity over exactly counted target tokens."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Described, Label, Setting, TextSeen
from lightning_kfac.metrics.functional import token_losses
from lightning_kfac.metrics.per_sequence import OneFigure


class _OfTokens(OneFigure):
    """exp(sum of token NLL / number of target tokens), summed in float64."""

    labels: ClassVar[dict[str, Label]] = {
        "perplexity": Label(
            "perplexity, held-out text",
            "{:.2f}",
            "lower",
            short="perplexity",
            panel="own",
            meaning="exp of the mean loss of a token; lower is better",
        )
    }
    seen = TextSeen
    higher_is_better = False
    columns = ("nll", "count")

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        return {"perplexity": Figure(values["nll"], values["count"], exponential=True)}


class LossPerplexity(_OfTokens):
    """exp(sum of token NLL / number of target tokens) of losses that are there already, summed in float64.

    Example:
        >>> metric = LossPerplexity()
        >>> metric.update(torch.tensor([[0.0, 2.0]]).log1p(), torch.tensor([[True, True]]))
        >>> round(metric.compute().item() ** 2, 4)
        3.0
    """

    @override
    def observe(self, seen: TextSeen) -> None:
        self.update(seen.losses, seen.valid, seen.index, seen.documents)

    @override
    def update(
        self,
        losses: Tensor,
        valid: Tensor,
        index: Sequence[int] | Tensor | None = None,
        documents: Tensor | None = None,
    ) -> None:
        """Adds a batch: token losses [B, T], valid bool [B, T], numbers of the rows, int64 [B, T] of the documents.

        Rows without a valid token are left out.
        """
        self.add_tokens(losses, valid, index, documents)


class Perplexity(_OfTokens):
    """exp(sum of token NLL / number of target tokens), summed in float64.

    Unlike a mean of batch perplexities it does not depend on how rows are batched or ranked.

    Example:
        >>> metric = Perplexity()
        >>> logits = torch.zeros(1, 3, 50)
        >>> metric.update(logits, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
        >>> round(metric.compute().item(), 4)
        50.0
    """

    @override
    def update(
        self, logits: Tensor, targets: Tensor, valid: Tensor, index: Sequence[int] | Tensor | None = None
    ) -> None:
        """Adds a batch: logits [B, T, V], targets int64 [B, T], valid bool [B, T], numbers of the rows."""
        losses = token_losses(logits.flatten(0, 1), targets.masked_fill(~valid, 0).flatten())
        self.add_tokens(losses.view_as(targets), valid, index, None)


class BatchMeanPerplexity(Described):
    """Mean over batches of exp(mean loss of the batch), as the original script of arXiv 2510.24256 computes it.

    It depends on the batch size; use it only to compare with published rows.

    Example:
        >>> metric = BatchMeanPerplexity()
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> metric.update(torch.tensor([[0.0, 0.0]]), valid)
        >>> metric.update(torch.tensor([[2.0, 0.0]]), valid)
        >>> round(metric.compute().item(), 4)
        1.8591

    Attributes:
        total, batches: The states: float64 scalars.
    """

    total: Tensor
    batches: Tensor
    labels: ClassVar[dict[str, Label]] = {
        "perplexity_batch_mean": Label("mean of exp(batch loss)", "{:.2f}", "lower"),
    }
    seen = TextSeen
    full_state_update = False
    higher_is_better = False

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return cls() if setting.measures.batch_mean_perplexity else None

    @override
    def observe(self, seen: TextSeen) -> None:
        self.update(seen.losses, seen.valid)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        for name in ("total", "batches"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, losses: Tensor, valid: Tensor) -> None:
        """Adds a batch of token losses [B, T]; valid bool [B, T]."""
        if valid.any():
            self.total += (losses.double().masked_fill(~valid, 0).sum() / valid.sum()).exp()
            self.batches += 1

    @override
    def compute(self) -> Tensor:
        """float64 scalar; NaN before any batch."""
        return self.total / self.batches
