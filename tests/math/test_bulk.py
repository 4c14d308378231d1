"""Shares of flat directions against loops over tokens and directions."""

import math

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.math.bulk import FLAT, bulk_energies, bulk_share, flattest, gains, random_basis
from tests.common import generator


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_the_flattest_directions_have_the_least_curvature():
    depth = torch.tensor([5.0, 0.5, 4.0, 0.1, 3.0, 2.0, 0.2, 1.0, 0.3, 9.0], dtype=torch.float64)
    chosen = flattest(depth)
    assert chosen.tolist() == [d in (0.5, 0.1, 0.2, 1.0, 0.3, 2.0) for d in depth.tolist()]
    assert chosen.dtype == torch.bool
    assert flattest(torch.ones(1000), 0.4).tolist() == [False] * 600 + [True] * 400
    assert flattest(torch.ones(5), 0.4).tolist() == [False, False, False, True, True]
    assert flattest(torch.arange(7.0), 0.5).sum() == round(0.5 * 7) and FLAT == 0.6


@pytest.mark.parametrize("share", [0, 1, -0.5, math.nan])
def test_wrong_shares(share):
    with pytest.raises(InputError, match="share of flat directions"):
        flattest(torch.ones(3), share)


def test_shares_by_loops():
    W, inputs = random(4, 6), random(9, 6, seed=1)
    basis = torch.linalg.eigh(random(6, 6, seed=2).T @ random(6, 6, seed=2))[1]
    flat = torch.tensor([False, True, True, False, True, False])
    by_token = []
    for a in inputs:
        terms = [((W @ v) @ (W @ v) * (v @ a) ** 2).item() for v in basis.T]
        by_token.append([sum(t for t, f in zip(terms, flat.tolist(), strict=True) if f), sum(terms)])
    found = bulk_energies(inputs.view(3, 3, 6), basis, gains(W, basis), flat)
    assert found.view(9, 2).tolist() == [pytest.approx(pair) for pair in by_token]
    some, everything = (sum(column) for column in zip(*by_token, strict=True))
    assert bulk_share(inputs, W, basis, flat) == pytest.approx(some / everything)
    assert gains(W, basis).tolist() == pytest.approx([(W @ v).norm().item() ** 2 for v in basis.T])
    # Turning all inputs with the basis changes nothing, nor does their size.
    turn = random_basis(6, 3)
    assert bulk_share(inputs @ turn.T, W @ turn.T, turn @ basis, flat) == pytest.approx(some / everything)
    assert bulk_share(7 * inputs, W, basis, flat) == pytest.approx(some / everything)


def test_half_precision_is_added_up_in_the_dtype_of_the_basis():
    found = bulk_energies(random(5, 6).bfloat16(), torch.eye(6), torch.ones(6), flattest(torch.arange(6.0)))
    assert found.dtype == torch.float32
    assert gains(random(4, 6).bfloat16(), torch.eye(6)).dtype == torch.float32


def test_nothing_that_reaches_a_layer():
    assert math.isnan(bulk_share(torch.zeros(2, 3), torch.eye(3), torch.eye(3), flattest(torch.ones(3))))


def test_random_bases():
    basis = random_basis(8)
    assert basis.T @ basis == pytest.approx(torch.eye(8).double().numpy(), abs=1e-12)
    assert basis.equal(random_basis(8, 0)) and not basis.equal(random_basis(8, 1))
