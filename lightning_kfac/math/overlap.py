"""How far two kept sets agree, although each is written in a basis of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.math.selection import select_products
from lightning_kfac.math.spectrum import Spectrum


class KeptSet(NamedTuple):
    """The components that an edit with formula ``original`` keeps: a staircase in a curvature basis.

    Attributes:
        G, A: Eigenbases.
        counts: int64 [d_out], how many leading columns row i keeps.
    """

    G: Spectrum
    A: Spectrum
    counts: Tensor

    @classmethod
    def at(cls, rho: float, G: Spectrum, A: Spectrum) -> "KeptSet":
        """The set that holds a share rho of the curvature mass."""
        return cls(G, A, select_products(G.values, A.values, rho))


def overlap(first: KeptSet, second: KeptSet) -> float:
    """Overlap of the kept subspaces of two sets, in [0, 1]; 1 where they are the same.

    The kept part of a weight is P W = sum over kept (i, j) of u_i u_i^T W v_j v_j^T. With n and n' kept
    components the overlap is tr(P P') / sqrt(n n')
    = sum over kept (i, j) and (k, l) of (u_i . u'_k)^2 (v_j . v'_l)^2 / sqrt(n n').
    Comparing indices instead would call a mere exchange of two equal eigenvectors a change.
    """
    rows = (first.G.vectors.T @ second.G.vectors) ** 2
    columns = (first.A.vectors.T @ second.A.vectors) ** 2
    shared = (_mask(first) * (rows @ _mask(second) @ columns.T)).sum()
    kept = first.counts.sum().double() * second.counts.sum().double()
    return (shared / kept.sqrt()).item() if kept else 1.0


def _mask(kept: KeptSet) -> Tensor:
    columns = len(kept.A.values)
    return (torch.arange(columns, device=kept.counts.device) < kept.counts[:, None]).to(kept.G.vectors.dtype)
