"""Bands of curvature against sorts, and their energies against weights applied to inputs one by one."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_kfac.math.bands import (
    band_forms,
    band_masks,
    band_ratios,
    band_shares,
    energies,
    singular_forms,
    whitening_exponent,
)
from tests.common import descending, generator

# -- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bands", [1, 2, 3, 5, 7, 12, 15])
@pytest.mark.parametrize("ties", [False, True])
def test_bands_are_slices_of_a_full_sort(n_bands, ties):
    importance = torch.rand(3, 4, generator=generator())
    if ties:
        importance = torch.randint(0, 3, (3, 4), generator=generator()).double()
    order = sorted(range(12), key=lambda place: -importance.flatten()[place].item())
    masks = band_masks(importance, n_bands)
    assert len(masks) == n_bands
    for number, mask in enumerate(masks):
        first, last = round(12 * number / n_bands), round(12 * (number + 1) / n_bands)
        assert mask.dtype == torch.bool and mask.shape == (3, 4)
        assert mask.flatten().nonzero().flatten().tolist() == sorted(order[first:last])
    assert torch.equal(sum(mask.long() for mask in masks), torch.ones(3, 4).long())


def test_bands_of_one_component():
    assert [mask.tolist() for mask in band_masks(torch.tensor([[0.0]]), 1)] == [[[True]]]


# -- energies ----------------------------------------------------------------------------------------------


def example(d_out=4, d_in=5, n_bands=3):
    """A weight in a basis, the bases, and masks."""
    W = torch.randn(d_out, d_in, generator=generator(), dtype=torch.float64)
    U_G, _ = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator(1), dtype=torch.float64))
    U_A, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator(2), dtype=torch.float64))
    C = U_G.T @ W @ U_A
    return W, C, U_G, U_A, band_masks(torch.rand(d_out, d_in, generator=generator(3)), n_bands)


def test_forms_give_the_squared_length_of_each_bands_output():
    W, C, U_G, U_A, masks = example()
    forms = band_forms(C, U_A, masks)
    assert forms.dtype == torch.float32 and forms.shape == (4, 5, 5)
    parts = [U_G @ (C * mask) @ U_A.T for mask in masks] + [W]
    for x in torch.randn(10, 5, generator=generator(4), dtype=torch.float64):
        for form, part in zip(forms, parts, strict=True):
            expected = (part @ x).square().sum().item()
            # The form's entries, up to ten or so, are rounded to float32.
            assert (x @ form.double() @ x).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_energies_are_sums_over_inputs():
    W, C, U_G, U_A, masks = example()
    inputs = torch.randn(50, 5, generator=generator(5), dtype=torch.float64)
    A_sum = sum(torch.outer(x, x) for x in inputs)
    found = energies(band_forms(C, U_A, masks), A_sum)
    parts = [U_G @ (C * mask) @ U_A.T for mask in masks] + [W]
    expected = [sum((part @ x).square().sum().item() for x in inputs) for part in parts]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)  # float32 products


def test_energies_of_whole_numbers_are_exact():
    forms = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 5.0], [0.0, 0.0]]])
    A_sum = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=torch.float64)
    assert energies(forms, A_sum).tolist() == [4321, 50]


# -- shares and ratios -------------------------------------------------------------------------------------


def draws(n):
    """Rows that each of 2000 resamplings draws."""
    return np.random.default_rng(0).integers(0, n, (2000, n)).tolist()


def bounds(values):
    """2.5 % and 97.5 % with linear interpolation."""
    values, found = sorted(values), []
    for share in (0.025, 0.975):
        place = share * (len(values) - 1)
        below = math.floor(place)
        found.append(values[below] + (place - below) * (values[below + 1] - values[below]))
    return found


def assert_bands(found, values, resampled):
    assert found.value.tolist() == pytest.approx(values, rel=1e-12)
    for side in (found.value, found.low, found.high):
        assert isinstance(side, np.ndarray) and side.dtype == np.float64 and side.shape == (len(values),)
    for band, (low, high) in enumerate(map(bounds, resampled)):
        assert found.low[band] == pytest.approx(low, rel=1e-12)
        assert found.high[band] == pytest.approx(high, rel=1e-12)


def test_shares_of_the_whole_output():
    shards = np.random.default_rng(1).random((6, 4)) + 0.1
    rows = shards.tolist()

    def share(band, drawn):
        return math.sqrt(sum(rows[i][band] for i in drawn) / sum(rows[i][3] for i in drawn))

    resampled = [[share(band, drawn) for drawn in draws(6)] for band in range(3)]
    assert_bands(band_shares(shards), [share(band, range(6)) for band in range(3)], resampled)


def test_ratios_of_root_mean_squares_resample_both_texts_apart():
    """The second text takes each draw one resampling later than the first, so that equal numbers differ."""
    rng = np.random.default_rng(2)
    shards, others = rng.random((6, 4)) + 0.1, rng.random((6, 4)) + 0.1
    counts, other_counts = rng.integers(5, 9, 6), rng.integers(50, 90, 6)

    def mean_square(values, numbers, band, drawn):
        return sum(values[i, band] for i in drawn) / sum(numbers[i] for i in drawn)

    def ratio(band, drawn, other_drawn):
        return math.sqrt(
            mean_square(shards, counts, band, drawn) / mean_square(others, other_counts, band, other_drawn)
        )

    drawn = draws(6)
    resampled = [[ratio(band, drawn[i], drawn[i - 1]) for i in range(2000)] for band in range(3)]
    found = band_ratios(shards, counts, others, other_counts)
    assert_bands(found, [ratio(band, range(6), range(6)) for band in range(3)], resampled)


def test_texts_of_different_numbers_of_shards_compare():
    rng = np.random.default_rng(3)
    found = band_ratios(rng.random((5, 3)) + 1, np.full(5, 10), rng.random((8, 3)) + 1, np.full(8, 10))
    assert found.value.shape == (2,) and (found.low <= found.value).all() and (found.value <= found.high).all()


def test_one_shard_has_no_width():
    found = band_shares(np.array([[1.0, 4.0, 16.0]]))
    value, low, high = found
    assert value.tolist() == [0.25, 0.5] and np.isnan([low, high]).all()
    one, four = np.array([[1.0, 4.0, 16.0]]), np.array([[4.0, 4.0, 16.0]])
    ratios = band_ratios(one, np.array([2]), four, np.array([2]))
    value, low, high = ratios
    assert value.tolist() == [0.5, 1.0] and np.isnan([low, high]).all()


@pytest.mark.parametrize("n_bands", [1, 4, 10])
def test_bands_are_of_equal_count_and_in_order(n_bands):
    importance = torch.rand(9, 7, generator=generator(), dtype=torch.float64).round(decimals=1)  # with ties
    masks = band_masks(importance, n_bands)
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(9, 7, dtype=torch.long))
    order = sorted(range(63), key=lambda k: (-importance.flatten()[k].item(), k))
    for number, mask in enumerate(masks):
        expected = order[round(63 * number / n_bands) : round(63 * (number + 1) / n_bands)]
        assert mask.flatten().nonzero().flatten().tolist() == sorted(expected)


def test_energies_are_a_loop_over_tokens():
    d_out, d_in, n = 9, 7, 20
    W, X = (
        torch.randn(*s, generator=generator(i), dtype=torch.float64) for i, s in enumerate([(d_out, d_in), (n, d_in)])
    )
    U_G, U_A = (
        torch.linalg.qr(torch.randn(d, d, generator=generator(d), dtype=torch.float64))[0] for d in (d_out, d_in)
    )
    C, masks = U_G.T @ W @ U_A, band_masks(torch.outer(descending(d_out, 2), descending(d_in, 3)), 4)
    found = energies(band_forms(C, U_A, masks), X.T @ X)
    expected = [sum(((U_G @ (C * mask) @ U_A.T) @ x).square().sum().item() for x in X) for mask in masks]
    expected.append(sum((W @ x).square().sum().item() for x in X))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # the forms are float32


def test_shares_and_ratios_with_intervals():
    rng = np.random.default_rng(0)
    shards, others = rng.uniform(1, 2, (24, 4)), rng.uniform(2, 3, (16, 4))
    counts, other_counts = np.full(24, 10), rng.integers(5, 20, 16)
    shares = band_shares(shards)
    assert shares.value == pytest.approx(np.sqrt(shards.sum(0)[:3] / shards.sum(0)[3]), rel=1e-12)
    ratios = band_ratios(shards, counts, others, other_counts)
    per_input = shards.sum(0)[:3] / 240, others.sum(0)[:3] / other_counts.sum()
    assert ratios.value == pytest.approx(np.sqrt(per_input[0] / per_input[1]), rel=1e-12)
    for bands in (shares, ratios):
        assert (bands.low < bands.value).all() and (bands.value < bands.high).all()
    # A bootstrap by hand, with other draws.
    draws = []
    for _ in range(3000):
        a, b = rng.integers(0, 24, 24), rng.integers(0, 16, 16)
        x, y = shards[a, 0].sum() / counts[a].sum(), others[b, 0].sum() / other_counts[b].sum()
        draws.append(math.sqrt(x / y))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (ratios.low[0], ratios.high[0]) == tuple(pytest.approx(v, abs=0.08 * (high - low)) for v in (low, high))


def test_whitening_exponent_by_hand():
    """A least-squares line through the directions; shards of both texts are resampled apart."""
    rng = np.random.default_rng(5)
    shards, others = rng.random((20, 30)) + 0.1, (rng.random((24, 30)) + 0.1) * np.geomspace(1, 1e-3, 30)
    counts, other_counts = rng.integers(5, 9, 20), rng.integers(50, 90, 24)

    def slope(some, rest):
        x, y = [], []
        for direction in range(30):
            text = sum(shards[i, direction] for i in some) / sum(counts[i] for i in some)
            other = sum(others[i, direction] for i in rest) / sum(other_counts[i] for i in rest)
            x.append(math.log(other))
            y.append(math.log(text / other))
        return float(np.polyfit(x, y, 1)[0])

    found = whitening_exponent(shards, counts, others, other_counts)
    assert found.value == pytest.approx(slope(range(20), range(24)), rel=1e-9)
    draws = [slope(rng.integers(0, 20, 20), rng.integers(0, 24, 24)) for _ in range(1500)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))


def test_whitening_of_known_texts():
    """Of the same text 0; of energies that are a power of the other's, that power less one; idle ones are left out."""
    energies = np.geomspace(1, 1e-4, 40)[None]
    one = np.ones(1)
    assert whitening_exponent(energies, one, energies, one).value == pytest.approx(0, abs=1e-12)
    for power in (0.35, 1.5):
        found = whitening_exponent(energies**power, one, energies, one)
        assert found.value == pytest.approx(power - 1, rel=1e-9) and math.isnan(found.low) and math.isnan(found.high)
    idle = np.concatenate([energies, np.zeros((1, 5))], 1)
    assert whitening_exponent(idle**0.5, one, idle, one).value == pytest.approx(-0.5, rel=1e-9)


def test_bands_between_cuts():
    """The paper's: the top 10 %, to 25, to 50, and the rest."""
    importance = torch.rand(10, 8, generator=generator(), dtype=torch.float64)
    masks = band_masks(importance, [0.1, 0.25, 0.5, 1])
    assert [int(mask.sum()) for mask in masks] == [8, 12, 20, 40]
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(10, 8, dtype=torch.long))
    for above, below in itertools.pairwise(masks):
        assert importance[above].min() >= importance[below].max()


def test_bands_of_singular_directions():
    """By a loop over inputs: what the weight's parts, cut by singular values, make of them."""
    W = torch.randn(9, 7, generator=generator(1), dtype=torch.float64)
    X = torch.randn(20, 7, generator=generator(2), dtype=torch.float64)
    u, sigma, v = torch.linalg.svd(W, full_matrices=False)
    found = energies(singular_forms(W, [0.3, 1]), X.T @ X)
    parts = [(u[:, some] * sigma[some]) @ v[some] for some in (slice(0, 2), slice(2, 7), slice(0, 7))]
    assert found.tolist() == pytest.approx(
        [sum((part @ x).square().sum().item() for x in X) for part in parts], rel=1e-6
    )
    assert found[:2].sum().item() == pytest.approx(found[2].item(), rel=1e-6)  # singular directions do not mix
