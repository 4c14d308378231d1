"""Sums of outer products against float64 sums."""

import pytest
import torch

from lightning_kfac.math.covariance import SecondMoment, mirror, pack_upper, unpack_upper
from tests.common import generator


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 131])
def test_second_moment_is_x_transposed_x(size):
    moment = SecondMoment(size)
    batches = [torch.randn(n, size, generator=generator(n)) for n in (1, 7, 30)]
    for x in batches:
        moment.add(x)
    exact = sum(x.double().T @ x.double() for x in batches)
    assert torch.equal(moment.sum(), moment.sum().T)
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6
    assert moment.trace().item() == pytest.approx(exact.trace().item(), rel=1e-5)


def test_second_moment_stays_exact_over_4096_batches():
    moment, exact = SecondMoment(6), torch.zeros(6, 6, dtype=torch.float64)
    for i in range(4096):
        x = torch.rand(8, 6, generator=generator(i)) + 0.5  # all positive: the sum only grows
        moment.add(x)
        exact += x.double().T @ x.double()
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6


def test_second_moment_of_bfloat16_has_no_further_rounding():
    x = torch.randn(40, 9, generator=generator()).bfloat16()
    moment = SecondMoment(9)
    moment.add(x)
    exact = x.double().T @ x.double()
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6


def test_packing_keeps_every_bit():
    matrix = mirror(torch.randn(11, 11, generator=generator()))
    assert pack_upper(matrix).shape == (66,)
    assert torch.equal(unpack_upper(pack_upper(matrix), 11), matrix)
