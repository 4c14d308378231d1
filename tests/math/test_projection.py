"""Weights from kept components against the sum of these components."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_kfac.math.projection import suppress
from tests.common import generator


def example(d_out, d_in, dtype=torch.float64):
    """Components and two orthonormal bases."""
    c = torch.randn(d_out, d_in, generator=generator(), dtype=torch.float64)
    U_G, _ = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator(1), dtype=torch.float64))
    U_A, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator(2), dtype=torch.float64))
    return c.to(dtype), U_G.to(dtype), U_A.to(dtype)


def sum_of_components(c, keep, U_G, U_A):
    total = torch.zeros(c.shape, dtype=torch.float64)
    for i, j in keep.nonzero().tolist():
        total += c[i, j].double() * torch.outer(U_G[:, i].double(), U_A[:, j].double())
    return total


def test_suppress_is_the_sum_of_kept_components():
    W = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    U_G, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator(1), dtype=torch.float64))
    U_A, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator(2), dtype=torch.float64))
    keep = torch.rand(4, 3, generator=generator(3)) > 0.4
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for j in range(3):
            if keep[i, j]:
                expected += (U_G[:, i] @ W @ U_A[:, j]) * torch.outer(U_G[:, i], U_A[:, j])
    assert torch.allclose(suppress(U_G.T @ W @ U_A, keep, U_G, U_A), expected, atol=1e-14)


# (d_out, d_in), then the last kept row and column: either order of the two products, and both alike.
SHAPES = [
    ((5, 5), (5, 5)),
    ((9, 4), (2, 3)),
    ((4, 9), (3, 2)),
    ((7, 6), (1, 6)),
    ((7, 6), (7, 1)),
    ((6, 6), (3, 3)),
    ((12, 3), (12, 2)),
    ((3, 12), (1, 12)),
    ((1, 1), (1, 1)),
    ((8, 5), (6, 2)),
    ((5, 8), (2, 6)),
    ((8, 5), (2, 4)),
    ((5, 8), (4, 2)),
]


@pytest.mark.parametrize(("shape", "last"), SHAPES)
def test_only_what_is_kept_is_multiplied_and_in_the_cheaper_order(shape, last):
    c, U_G, U_A = example(*shape)
    (d_out, d_in), (rows, columns) = shape, last
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[rows - 1, 0] = keep[0, columns - 1] = True
    expected = sum_of_components(c, keep, U_G, U_A)
    # What lies after the last kept row and column is not looked at.
    U_G[:, rows:] = U_A[:, columns:] = float("nan")
    c[rows:] = c[:, columns:] = float("nan")
    with FlopCounterMode(display=False) as counter:
        found = suppress(c, keep, U_G, U_A)
    assert torch.allclose(found, expected, atol=1e-14)
    costs = [products(keep, cut) for cut in range(rows + 1)]
    right_first = rows * columns * d_in + d_out * rows * d_in
    left_first = d_out * rows * columns + d_out * columns * d_in
    assert (costs[-1], costs[0]) == (right_first, left_first)
    assert counter.get_total_flops() == 2 * min(costs)


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 24), (24, 40), (37, 37)])
def test_a_staircase_is_cut_where_it_costs_least(d_out, d_in):
    c, U_G, U_A = example(d_out, d_in)
    keep = torch.arange(1, d_out + 1)[:, None] * torch.arange(1, d_in + 1) <= 30
    with FlopCounterMode(display=False) as counter:
        found = suppress(c, keep, U_G, U_A)
    assert torch.allclose(found, U_G @ (c * keep) @ U_A.T, atol=1e-13)
    costs = [products(keep, cut) for cut in range(int(keep.any(1).sum()) + 1)]
    assert counter.get_total_flops() == 2 * min(costs)
    assert min(costs) < 0.8 * min(costs[0], costs[-1])


def products(keep, cut):
    """Multiplications where the rows before a cut meet U_A^T first and the others, as wide as they are, U_G."""
    d_out, d_in = keep.shape
    rows, columns = (1 + int(keep.any(dim).nonzero().max()) for dim in (1, 0))
    lower = keep[cut:].any(0).nonzero()
    width = 1 + int(lower.max()) if len(lower) else 0
    return cut * columns * d_in + d_out * (rows - cut) * width + d_out * (cut + width) * d_in


def test_equal_costs_are_multiplied_from_the_right():
    """Of a square everything kept costs the same both ways: float32 rounding tells which way it went."""
    c, U_G, U_A = example(33, 33, torch.float32)
    keep = torch.ones(33, 33, dtype=torch.bool)
    right_first, left_first = U_G @ (c @ U_A.T), (U_G @ c) @ U_A.T
    assert not torch.equal(right_first, left_first)
    assert torch.equal(suppress(c, keep, U_G, U_A), right_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_kept_is_zero(dtype):
    c, U_G, U_A = example(4, 3, dtype)
    found = suppress(c, torch.zeros(4, 3, dtype=torch.bool), U_G, U_A)
    assert found.dtype == dtype and torch.equal(found, torch.zeros(4, 3, dtype=dtype))


def test_everything_kept_is_the_weight():
    c, U_G, U_A = example(4, 3)
    assert torch.allclose(suppress(c, torch.ones(4, 3, dtype=torch.bool), U_G, U_A), U_G @ c @ U_A.T, atol=1e-14)


@pytest.mark.parametrize("of_c", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_vectors", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_products_have_the_dtype_asked_for_or_that_of_the_components(of_c, of_vectors, dtype, shape):
    c, U_G, U_A = example(*shape)
    c, U_G, U_A = c.to(of_c), U_G.to(of_vectors), U_A.to(of_vectors)
    keep = torch.rand(shape, generator=generator(3)) > 0.4
    found = suppress(c, keep, U_G, U_A, dtype)
    assert found.dtype == (dtype or of_c)
    # Sums of nine products of numbers around one: a few roundings of the narrowest type that took part.
    exact_all = torch.float64 == of_c == of_vectors == found.dtype
    assert torch.allclose(found.double(), sum_of_components(c, keep, U_G, U_A), atol=1e-14 if exact_all else 2e-6)


def test_the_default_device_plays_no_part():
    c, U_G, U_A = example(4, 3)
    keep = torch.rand(4, 3, generator=generator(3)) > 0.4
    expected = sum_of_components(c, keep, U_G, U_A)
    with torch.device("meta"):
        assert torch.allclose(suppress(c, keep, U_G, U_A), expected, atol=1e-14)
