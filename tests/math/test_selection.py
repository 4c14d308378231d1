"""Selection against a full sort with exact sums."""

import pytest
import torch

from lightning_kfac import InputError, select_components, select_products
from lightning_kfac.math.importance import modified, original
from tests.common import generator
from tests.oracle import full_sort_selection

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
