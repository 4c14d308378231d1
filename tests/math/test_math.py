"""The pure functions against slow and obvious computations."""

import numpy as np
import pytest
import torch

from lightning_kfac import InputError, select_components, select_products
from lightning_kfac.math.covariance import SecondMoment, mirror, pack_upper, unpack_upper
from lightning_kfac.math.importance import modified, original
from lightning_kfac.math.loss import (
    sample_labels,
    uniforms,
    valid_positions,
)
from lightning_kfac.math.projection import suppress
from lightning_kfac.math.spectrum import eigenbasis
from tests.oracle import full_sort_selection


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- covariance ----------------------------------------------------------------------------------------


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


# -- loss ------------------------------------------------------------------------------------------------


def test_valid_positions():
    attend = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert valid_positions(attend).tolist() == [[True, True, False, False], [False, True, True, False]]
    labels = torch.tensor([[5, 5, -100, 5], [5, 5, 5, 5]])
    assert valid_positions(attend, labels)[0].tolist() == [True, False, False, False]


def test_uniforms_depend_on_sample_position_and_draw_only():
    index = torch.tensor([3, 8])
    position = torch.arange(6).repeat(2, 1)
    together = uniforms(7, index, position)
    assert together.dtype == torch.float64 and ((together >= 0) & (together < 1)).all()
    assert torch.equal(uniforms(7, index[1:], position[1:, :4])[0], together[1, :4])
    shifted = torch.tensor([[0, 0, 0, 1, 2, 3]])  # left padding
    assert torch.equal(uniforms(7, index[:1], shifted)[0, 2:], together[0, :4])
    for other in (uniforms(8, index, position), uniforms(7, index + 1, position), uniforms(7, index, position, draw=1)):
        assert not torch.isin(other, together).any()


def test_sampled_labels_invert_the_cumulative_distribution():
    logits = 3 * torch.randn(50, 13, generator=generator())
    u = torch.rand(50, generator=generator(1), dtype=torch.float64)
    expected = []
    for row, number in zip(logits.double().numpy(), u.tolist(), strict=True):
        cdf = np.cumsum(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        expected.append(next(k for k in range(13) if cdf[k] > number * cdf[-1]))
    assert sample_labels(logits, u).tolist() == expected
    assert sample_labels(logits, torch.zeros(50, dtype=torch.float64)).tolist() == [0] * 50
    # A class of probability zero is never drawn, whatever u.
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).repeat(1001, 1)
    drawn = sample_labels(logits, torch.linspace(0, 1 - 1e-16, 1001, dtype=torch.float64))
    assert set(drawn.tolist()) == {1, 3}


def test_sampled_labels_have_the_right_frequencies():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    n = 20_000
    u = uniforms(0, torch.arange(n // 100), torch.arange(100).repeat(n // 100, 1)).flatten()
    counts = sample_labels(logits.repeat(n, 1), u).bincount(minlength=4)
    expected = n * logits.softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.27  # 99.9 % quantile with 3 degrees of freedom; the seed is fixed


# -- spectrum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_eigenbasis_reconstructs(rank):
    x = torch.randn(rank, 9, generator=generator(), dtype=torch.float64)
    matrix = x.T @ x
    values, vectors = eigenbasis(matrix.float())
    assert (values.diff() <= 0).all() and (values >= 0).all()
    assert torch.allclose(vectors.T @ vectors, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert ((vectors * values) @ vectors.T - matrix).norm() / matrix.norm() < 1e-6  # the float32 input


def test_wrong_matrices_have_no_eigenbasis():
    with pytest.raises(InputError, match="A of fc has NaN"):
        eigenbasis(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "A of fc")
    with pytest.raises(InputError, match="eigenvalue -1"):
        eigenbasis(torch.diag(torch.tensor([2.0, -1.0])))


# -- selection -----------------------------------------------------------------------------------------------

RHOS = [0.0, 1e-9, 0.1, 0.6, 0.75, 0.999, 1.0]
SPECTRA = {
    "random": (
        torch.rand(7, generator=generator(1)).sort(descending=True).values,
        torch.rand(9, generator=generator(2)).sort(descending=True).values,
    ),
    "power law": (torch.arange(1, 12).double() ** -1.5, torch.arange(1, 8).double() ** -0.7),
    "ties": (torch.tensor([4.0, 2, 2, 1, 1, 1]), torch.tensor([8.0, 4, 4, 2, 1])),
    "all equal": (torch.ones(5), torch.ones(4)),
    "zeros": (torch.tensor([3.0, 1, 0, 0]), torch.tensor([2.0, 2, 0])),
    "one": (torch.tensor([2.0]), torch.tensor([5.0])),
    "tiny and huge": (torch.tensor([1e30, 1.0, 1e-30]).double(), torch.tensor([1e20, 1e-40]).double()),
}


def kept_cells(keep):
    return sorted((i, j) for i, j in keep.nonzero().tolist())


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("case", SPECTRA)
def test_select_products_equals_a_full_sort(case, rho):
    rows, columns = SPECTRA[case]
    counts = select_products(rows, columns, rho)
    importance = original(rows.double(), columns.double())
    expected = full_sort_selection(importance, rho)
    assert sorted((i, j) for i, n in enumerate(counts.tolist()) for j in range(n)) == expected
    assert kept_cells(select_components(importance, rho)) == expected


@pytest.mark.parametrize("rho", RHOS)
def test_select_components_equals_a_full_sort(rho):
    lambda_G, mu_A = SPECTRA["random"]
    c = torch.randn(7, 9, generator=generator(3))
    importance = modified(original(lambda_G, mu_A), c)
    importance[2, 3] = importance[5, 1] = importance[0, 0]
    importance[6] = 0
    assert kept_cells(select_components(importance, rho)) == full_sort_selection(importance, rho)


@pytest.mark.parametrize("seed", range(20))
def test_select_products_on_random_integers_with_many_ties(seed):
    rows = torch.randint(0, 5, (8,), generator=generator(seed)).sort(descending=True).values + torch.zeros(8)
    columns = torch.randint(0, 4, (6,), generator=generator(seed + 99)).sort(descending=True).values + torch.zeros(6)
    rows[0] = columns[0] = 5
    rho = torch.rand((), generator=generator(seed)).item()
    counts = select_products(rows, columns, rho)
    cells = sorted((i, j) for i, n in enumerate(counts.tolist()) for j in range(n))
    assert cells == full_sort_selection(original(rows, columns), rho)


def test_selection_agrees_at_a_realistic_size():
    lambda_G = torch.arange(1, 801, dtype=torch.float64) ** -1.2
    mu_A = torch.arange(1, 501, dtype=torch.float64) ** -1.6
    for rho in (0.3, 0.6, 0.9):
        counts = select_products(lambda_G, mu_A, rho)
        keep = torch.arange(500) < counts[:, None]
        assert torch.equal(keep, select_components(original(lambda_G, mu_A), rho))


@pytest.mark.parametrize("rho", [-0.1, 1.1, float("nan"), float("inf"), "0.5"])
def test_wrong_rho(rho):
    with pytest.raises(InputError, match="rho is"):
        select_products(torch.ones(2), torch.ones(2), rho)
    with pytest.raises(InputError, match="rho is"):
        select_components(torch.ones(2, 2), rho)


def test_wrong_importance():
    with pytest.raises(InputError, match="zero everywhere"):
        select_components(torch.zeros(2, 2), 0.5)
    with pytest.raises(InputError, match="zero everywhere"):
        select_products(torch.zeros(2), torch.ones(2), 0.5)
    with pytest.raises(InputError, match="negative"):
        select_components(torch.tensor([[1.0, -1.0]]), 0.5)
    with pytest.raises(InputError, match="descending"):
        select_products(torch.tensor([1.0, 2.0]), torch.ones(2), 0.5)


# -- projection ------------------------------------------------------------------------------------------------


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
