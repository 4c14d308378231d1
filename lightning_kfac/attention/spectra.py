"""Spectra of attention residuals.

The second moment of a head's residuals is M = 1/N sum_t eps_t eps_t^T, uncentred. Its eigenvectors are the right
singular vectors of the stacked residuals [N, d]; its eigenvalues are the squared singular values over N.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.math.spectrum import eigenbasis
from lightning_kfac.models.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class HeadSpectra:
    """What was measured at the H heads of one layer.

    Attributes:
        second_moment: float64 [H, d, d], mean of eps eps^T over valid positions.
        entropy: float64 [H], mean entropy of the attention probabilities, in nats.
        top1_mass: float64 [H], mean of the largest probability.

    Example:
        >>> spectra = HeadSpectra(torch.diag(torch.tensor([9.0, 1.0])).double()[None], torch.zeros(1), torch.ones(1))
        >>> spectra.cumulative_variance.tolist(), spectra.effective_dimension().tolist()
        ([[0.9, 1.0]], [1])
    """

    second_moment: Tensor
    entropy: Tensor
    top1_mass: Tensor

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        heads = [eigenbasis(moment, f"residuals of head {h}") for h, moment in enumerate(self.second_moment)]
        return torch.stack([head.values for head in heads]), torch.stack([head.vectors for head in heads])

    @property
    def variances(self) -> Tensor:
        """float64 [H, d], mean squares along the right singular vectors, descending."""
        return self._eigen[0]

    @property
    def cumulative_variance(self) -> Tensor:
        """float64 [H, d]: entry r - 1 is the share of the variance that r directions hold; 1 for a head without any."""
        return cumulative_ratio(self.variances)

    def directions(self, rank: int) -> Tensor:
        """P_r, float64 [H, d, r]: the top r right singular vectors of each head's residuals."""
        return self._eigen[1][..., :rank]

    def effective_dimension(self, share: float = 0.9) -> Tensor:
        """int64 [H]: the fewest directions that hold this share of the variance."""
        return effective_dimension(self.variances, share)


@dataclass(frozen=True)
class ResidualSpectra(Mapping[int, HeadSpectra]):
    """Spectra by layer number, with where they come from.

    Attributes:
        layers: By layer number.
        metadata: ``fingerprint`` of the model's weights, ``n_tokens``, and what else is known.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> from lightning_kfac.attention.collect import collect_residuals
        >>> spectra = collect_residuals(load_model("demo"), [{"input_ids": torch.arange(100).view(2, 50)}], layers=[-1])
        >>> list(spectra), spectra[5].variances.shape, spectra.metadata["n_tokens"]
        ([5], torch.Size([4, 32]), 98)
    """

    layers: dict[int, HeadSpectra]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> HeadSpectra:
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def check_model(self, model: nn.Module) -> None:
        """Raises ``InputError`` where the spectra are those of other weights."""
        if self.metadata.get("fingerprint") != model_fingerprint(model):
            raise InputError(
                f"the residual spectra were collected on other weights ({self.metadata.get('model') or 'unnamed'}); "
                "collect them again on this model"
            )


def cumulative_ratio(variances: Tensor) -> Tensor:
    """Cumulative share of descending variances [..., d]; 1 where all are zero.

    Example:
        >>> cumulative_ratio(torch.tensor([3.0, 1.0])).tolist()
        [0.75, 1.0]
    """
    sums = variances.cumsum(-1)
    return torch.where(sums[..., -1:] > 0, sums / sums[..., -1:], 1.0)


def effective_dimension(variances: Tensor, share: float = 0.9) -> Tensor:
    """The smallest r whose cumulative share reaches ``share``, up to rounding. int64 [...].

    Args:
        variances: [..., d], descending.
    """
    return 1 + (cumulative_ratio(variances) < share * (1 - 1e-12)).sum(-1)


def model_fingerprint(model: nn.Module) -> str:
    """Identity of the weights that residuals depend on: samples of every parameter."""
    return weights_fingerprint(model, ())
