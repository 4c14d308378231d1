"""Overlaps of kept sets against traces of the projections themselves."""

import math

import pytest
import torch

from lightning_kfac.math.overlap import KeptSet, overlap
from lightning_kfac.math.spectrum import Spectrum, eigenbasis
from tests.common import generator
from tests.oracle import full_sort_selection

D_OUT, D_IN = 4, 5


def basis(size, seed):
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64))
    return Spectrum(torch.arange(size, 0, -1, dtype=torch.float64), vectors)


def kept(seed, counts):
    return KeptSet(basis(D_OUT, seed), basis(D_IN, seed + 50), torch.tensor(counts))


def projection(kept_set):
    """P as a matrix on vec(W): the sum of the outer products of the kept components. [d_out d_in, d_out d_in]."""
    total = torch.zeros(D_OUT * D_IN, D_OUT * D_IN, dtype=torch.float64)
    for i, count in enumerate(kept_set.counts.tolist()):
        for j in range(count):
            component = torch.outer(kept_set.G.vectors[:, i], kept_set.A.vectors[:, j]).flatten().double()
            total += torch.outer(component, component)
    return total


@pytest.mark.parametrize("first", [[5, 3, 1, 0], [1, 0, 0, 0], [5, 5, 5, 5]])
@pytest.mark.parametrize("second", [[4, 4, 2, 1], [0, 0, 0, 2], [5, 5, 5, 5]])
def test_overlap_is_a_trace_of_projections(first, second):
    a, b = kept(1, first), kept(2, second)
    expected = (projection(a) @ projection(b)).trace().item() / math.sqrt(sum(first) * sum(second))
    assert overlap(a, b) == pytest.approx(expected, rel=1e-12)
    assert overlap(b, a) == pytest.approx(expected, rel=1e-12)


def test_a_set_overlaps_itself_fully():
    a = kept(1, [5, 3, 1, 0])
    assert overlap(a, a) == pytest.approx(1, rel=1e-14)
    # An exchange of two eigenvectors within the kept set is no change.
    exchanged = a.A._replace(vectors=a.A.vectors[:, [1, 0, 2, 3, 4]])
    assert overlap(kept(1, [5, 3, 2, 0]), KeptSet(a.G, exchanged, torch.tensor([5, 3, 2, 0]))) == pytest.approx(1)


def test_disjoint_sets_do_not_overlap():
    a = kept(1, [2, 0, 0, 0])
    b = a._replace(counts=torch.tensor([0, 2, 0, 0]))
    assert overlap(a, b) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [3, 1, 0, 0]])
def test_an_empty_set_counts_as_the_same(counts):
    nothing, other = kept(1, [0, 0, 0, 0]), kept(2, counts)
    assert overlap(nothing, other) == overlap(other, nothing) == 1.0


def test_float32_bases():
    a, b = kept(1, [5, 3, 1, 0]), kept(2, [4, 4, 2, 1])
    narrow = [
        s._replace(G=s.G._replace(vectors=s.G.vectors.float()), A=s.A._replace(vectors=s.A.vectors.float()))
        for s in (a, b)
    ]
    assert overlap(*narrow) == pytest.approx(overlap(a, b), rel=1e-5)  # sums of a hundred float32 products


def test_many_components_are_counted_in_float64():
    """3e9 times 5e9 components would overflow int64, and their root is no float32 number."""
    a = KeptSet(basis(D_OUT, 1), basis(D_IN, 2), torch.tensor([3_000_000_001, 0, 0, 0]))
    b = a._replace(counts=torch.tensor([5_000_000_001, 0, 0, 0]))
    assert overlap(a, b) == pytest.approx(5 / math.sqrt(3_000_000_001 * 5_000_000_001), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8, 1.0])
def test_a_set_at_rho_holds_that_share(rho):
    G, A = basis(D_OUT, 1), basis(D_IN, 2)
    A = A._replace(values=A.values**2)
    found = KeptSet.at(rho, G, A)
    assert found.G is G and found.A is A
    cells = [(i, j) for i, n in enumerate(found.counts.tolist()) for j in range(n)]
    assert cells == full_sort_selection(G.values[:, None] * A.values, rho)


def test_the_default_device_plays_no_part():
    a, b = kept(1, [5, 3, 1, 0]), kept(2, [4, 4, 2, 1])
    expected = overlap(a, b)
    with torch.device("meta"):
        assert overlap(a, b) == expected


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
