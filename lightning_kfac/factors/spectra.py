"""The spectrum of a layer's curvature in numbers: what figures, tables and reports are made of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_kfac.math.selection import select_products
from lightning_kfac.math.spectrum import effective_rank
from lightning_kfac.models.targets import block_of, expert_of, projection_of

# Shares of the mass at which the cumulative curve is computed; the selection is exact at each.
CURVE = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


class Cut(NamedTuple):
    """What an edit by ``original`` keeps of a layer.

    Attributes:
        rho: Share of the mass.
        kept: int64 [d_out], leading columns kept in each row.
        fraction_kept: Share of components.
    """

    rho: float
    kept: np.ndarray
    fraction_kept: float


@dataclass(frozen=True)
class LayerSpectrum:
    """Eigenvalues of one layer's factors and what rho makes of their products.

    Attributes:
        lambdas: float64 [d_out], of G, descending.
        mu: float64 [d_in], of A, descending.
        curve: Shares of components kept, and the shares of the mass that they hold.
        cut: What an edit keeps; None where there is none.
        trace_A, trace_G: Sums of the eigenvalues.
        rank_A, rank_G: Effective ranks, exp of the entropy of the eigenvalues' shares.
        condition_A, condition_G: Largest over smallest eigenvalue; inf where the smallest is 0.
    """

    lambdas: np.ndarray
    mu: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    cut: Cut | None
    trace_A: float
    trace_G: float
    rank_A: float
    rank_G: float
    condition_A: float
    condition_G: float

    @property
    def fraction_kept(self) -> float:
        """Share of components kept; NaN where nothing is cut."""
        return math.nan if self.cut is None else self.cut.fraction_kept

    def numbers(self) -> dict[str, Any]:
        """For JSON: the figures without the eigenvalues."""
        names = ("trace_A", "trace_G", "rank_A", "rank_G", "condition_A", "condition_G")
        numbers = {name: getattr(self, name) if np.isfinite(getattr(self, name)) else None for name in names}
        shares = {f"{mass:g}": float(kept) for kept, mass in zip(*self.curve, strict=True)}
        return numbers | {"kept_for_mass": shares}


def layer_spectrum(lambdas: Tensor, mu: Tensor, rho: float | None = None) -> LayerSpectrum:
    """Summarises the product spectrum of a layer.

    Args:
        lambdas: [d_out], eigenvalues of G, descending.
        mu: [d_in], eigenvalues of A, descending.
        rho: Where an edit by ``original`` cuts.

    Example:
        >>> spectrum = layer_spectrum(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0, 0.0]), rho=0.7)
        >>> spectrum.cut.kept.tolist(), round(spectrum.fraction_kept, 3)
        ([2, 0], 0.333)
    """
    lambdas = lambdas.double().cpu()
    mu = mu.double().cpu()
    total = len(lambdas) * len(mu)
    shares = [int(_kept(lambdas, mu, mass).sum()) / total for mass in CURVE]
    cut = None
    if rho is not None:
        kept = _kept(lambdas, mu, rho)
        cut = Cut(rho, kept, float(kept.sum()) / total)
    return LayerSpectrum(
        lambdas.numpy(),
        mu.numpy(),
        (np.array(shares), np.array(CURVE)),
        cut,
        mu.sum().item(),
        lambdas.sum().item(),
        effective_rank(mu),
        effective_rank(lambdas),
        _condition(mu),
        _condition(lambdas),
    )


def by_projection(spectra: Mapping[str, LayerSpectrum]) -> dict[str, dict[int | None, LayerSpectrum]]:
    """Layers by projection (and expert; or, where it has no such name, by their own), then by block."""
    groups: dict[str, dict[int | None, LayerSpectrum]] = {}
    for name, spectrum in spectra.items():
        expert = expert_of(name)
        kind = projection_of(name) or name
        group = groups.setdefault(kind if expert is None else f"{kind} {expert}", {})
        # Of several layers of a kind in a block the others stand by themselves.
        (groups.setdefault(name, {}) if block_of(name) in group else group)[block_of(name)] = spectrum
    return {
        projection: dict(sorted(group.items(), key=lambda item: item[0] or 0)) for projection, group in groups.items()
    }


def log10_histogram(values: np.ndarray) -> Tensor:
    """log10 of the positive eigenvalues, for a histogram. float32."""
    return torch.from_numpy(np.log10(values[values > 0])).float()


def _kept(lambdas: Tensor, mu: Tensor, rho: float) -> np.ndarray:
    """Leading columns kept in each row, int64 [d_out]; none where there is no curvature."""
    if not (lambdas.any() and mu.any()):
        return np.zeros(len(lambdas), dtype=np.int64)
    return select_products(lambdas, mu, rho).numpy()


def _condition(values: Tensor) -> float:
    return (values[0] / values[-1]).item() if values[-1] > 0 else float("inf")
