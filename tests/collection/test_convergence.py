"""When to stop: overlaps against explicit projectors, and when snapshots are taken."""

import pytest
import torch

from lightning_kfac.collection.convergence import Snapshots
from lightning_kfac.math.overlap import KeptSet, overlap
from lightning_kfac.math.spectrum import eigenbasis


def random_kept_set(seed, rho=0.7):
    generator = torch.Generator().manual_seed(seed)
    G, A = (torch.randn(9, d, generator=generator, dtype=torch.float64) for d in (4, 3))
    return KeptSet.at(rho, eigenbasis(G.T @ G), eigenbasis(A.T @ A))


def projector(kept):
    """P as a matrix on the 12 entries of a weight."""
    P = torch.zeros(12, 12, dtype=torch.float64)
    for i, count in enumerate(kept.counts.tolist()):
        for j in range(count):
            direction = torch.outer(kept.G.vectors[:, i], kept.A.vectors[:, j]).flatten()
            P += torch.outer(direction, direction)
    return P


@pytest.mark.parametrize("rho", [0.3, 0.7, 1.0])
def test_overlap_is_the_trace_of_the_projectors(rho):
    first, second = random_kept_set(1, rho), random_kept_set(2, rho)
    P, Q = projector(first), projector(second)
    expected = (P * Q).sum() / (P.trace() * Q.trace()).sqrt()
    assert overlap(first, second) == pytest.approx(expected.item(), abs=1e-12)
    assert overlap(first, first) == pytest.approx(1, abs=1e-12)
    if rho == 1.0:
        assert overlap(first, second) == pytest.approx(1, abs=1e-12)


def test_overlap_does_not_mind_signs_and_order_of_equal_eigenvalues():
    kept = random_kept_set(3)
    flipped = KeptSet(kept.G._replace(vectors=-kept.G.vectors), kept.A, kept.counts)
    assert overlap(kept, flipped) == pytest.approx(1, abs=1e-12)


def test_snapshots_are_due_at_doublings():
    snapshots = Snapshots(0.5)
    due = [n for n in range(1, 41) if snapshots.due(1000)]
    assert due == [3, 5, 9, 17, 33]  # past 2,048, 4,096, 8,192, 16,384 and 32,768
