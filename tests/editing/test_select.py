"""Every mix with a domain against its definition."""

import pytest
import torch

from lightning_kfac import EditConfig, InputError
from lightning_kfac.editing import select
from tests.common import generator
from tests.editing.dense import (
    CELLS,
    D_IN,
    D_OUT,
    DOMAIN,
    GENERAL,
    MOMENTS,
    OTHER,
    dense_basis,
    edit,
    first_cells,
    masked,
    one_layer,
)
from tests.oracle import full_sort_selection


def dense_quadratic(factors, U_G, U_A):
    """S_ij = (u_i^T G u_i)(v_j^T A v_j), one number at a time."""
    S = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for i, j in CELLS:
        u, v = U_G[:, i], U_A[:, j]
        S[i, j] = (u @ factors.G.double() @ u) * (v @ factors.A.double() @ v)
    return S


def dense_mix(mix, basis, formula, rho, alphas, domains, normalize="mass", budget="count"):
    """The edited weight and the kept count of a mix, by its definition."""
    W = one_layer().fc.weight.detach().double()
    g, parts = GENERAL["fc"], [GENERAL["fc"], *(d["fc"] for d in domains)]
    weights = [1.0, *alphas]
    lam, U_G, mu, U_A = dense_basis(g.A, g.G)
    plain = lam[:, None] * mu * ((U_G.T @ W @ U_A) ** 2 if formula == "modified" else 1)
    count = len(full_sort_selection(plain, rho))
    if mix == "factors" or basis == "mixed":
        A = sum(a * p.A.double() / p.A.double().trace() for a, p in zip(weights, parts, strict=True))
        G = sum(a * p.G.double() / p.G.double().trace() for a, p in zip(weights, parts, strict=True))
        lam, U_G, mu, U_A = dense_basis(A, G)
    C = U_G.T @ W @ U_A
    square = C**2 if formula == "modified" else 1
    each = [dense_quadratic(p, U_G, U_A) for p in parts]
    if mix == "union":
        selections = [set(full_sort_selection(S * square, rho)) for S in each]
        cells = set().union(*selections)
        if budget == "count":  # lower both rhos together until the union fits
            for lowered in [rho, *(rho * k / 4000 for k in range(4000, -1, -1))]:
                cells = set().union(*(set(full_sort_selection(S * square, lowered)) for S in each))
                if len(cells) <= count:
                    break
        return masked(C, cells, U_G, U_A), len(cells)
    if mix == "factors":
        S = lam[:, None] * mu * square
    else:
        scale = [S.sum() if normalize == "mass" else 1.0 for S in each]
        S = sum(a * s / total for a, s, total in zip(weights, each, scale, strict=True)) * square
    cells = first_cells(S, count) if budget == "count" else full_sort_selection(S, rho)
    return masked(C, cells, U_G, U_A), len(cells)


@pytest.mark.parametrize("formula", ["original", "modified"])
@pytest.mark.parametrize("budget", ["count", "mass"])
@pytest.mark.parametrize(
    ("mix", "basis", "normalize"),
    [
        ("scores", "general", "mass"),
        ("scores", "mixed", "mass"),
        ("scores", "general", "none"),
        ("factors", "mixed", "mass"),
        ("union", "general", "mass"),
        ("union", "mixed", "mass"),
    ],
)
@pytest.mark.parametrize("rho", [0.6, 0.8, 0.97])
@pytest.mark.parametrize("two", [False, True])
def test_each_mix_equals_its_definition(mix, basis, normalize, budget, formula, two, rho):
    domains = {"sums": DOMAIN, "code": OTHER} if two else {"sums": DOMAIN}
    alpha = {"sums": 0.7, "code": 2.0} if two else 0.7
    weights = [1.0] * len(domains) if mix == "union" else [0.7, 2.0][: len(domains)]
    config = EditConfig(rho=rho, formula=formula, mix=mix, basis=basis, normalize=normalize, budget=budget, alpha=alpha)
    edited, report = edit(config, domains=domains)
    expected, count = dense_mix(mix, basis, formula, rho, weights, domains.values(), normalize, budget)
    assert report.n_kept == count
    assert (edited - expected).norm() <= 1e-5 * expected.norm()  # the cast to float32, and eigh's own rounding


def test_corrected_with_a_domain_takes_its_moments():
    domain_moments = {"sums": {"fc": torch.rand(D_OUT, D_IN, generator=generator(8)) ** 3}}
    config = EditConfig(rho=0.8, formula="corrected", alpha=0.5)
    edited, report = edit(config, moments=MOMENTS, domains={"sums": DOMAIN}, domain_moments=domain_moments)
    a, b = MOMENTS["fc"].double(), domain_moments["sums"]["fc"].double()
    W = one_layer().fc.weight.detach().double()
    _, U_G, _, U_A = dense_basis(GENERAL["fc"].A, GENERAL["fc"].G)
    cells = first_cells(a / a.sum() + 0.5 * b / b.sum(), len(full_sort_selection(a, 0.8)))
    assert report.n_kept == len(cells)
    assert (edited - masked(U_G.T @ W @ U_A, cells, U_G, U_A)).norm() <= 1e-5 * W.norm()
    with pytest.raises(InputError, match="need moments of the domain sums"):
        edit(config, moments=MOMENTS, domains={"sums": DOMAIN})
    with pytest.raises(InputError, match="formula corrected needs moments measured"):
        edit(EditConfig(formula="corrected"))


@pytest.mark.parametrize("mix", ["scores", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_is_the_plain_edit_bit_for_bit(mix, dtype):
    plain = edit(EditConfig(rho=0.8), dtype)[0]
    assert torch.equal(edit(EditConfig(rho=0.8, alpha=0.0, mix=mix), dtype, domains={"sums": DOMAIN})[0], plain)
    mixed = edit(EditConfig(rho=0.8, alpha=20.0, mix=mix), dtype, domains={"sums": DOMAIN})[0]
    assert not torch.equal(mixed, plain)


@pytest.mark.parametrize("mix", ["scores", "union", "factors"])
def test_the_ends_of_rho_with_a_domain(mix):
    W = one_layer().fc.weight.detach()
    assert torch.equal(edit(EditConfig(rho=1.0, mix=mix), domains={"sums": DOMAIN})[0], W)
    assert not edit(EditConfig(rho=0.0, mix=mix), domains={"sums": DOMAIN})[0].any()


@pytest.mark.parametrize("budget", ["mass", "count"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 1.0])
def test_a_large_weight_is_selected_from_spectra_and_gives_the_same(rho, budget, monkeypatch):
    """The importance of a large weight is never made; here it must not matter which way was gone."""
    config = EditConfig(rho=rho, budget=budget)
    small, expected = edit(config)
    monkeypatch.setattr(select, "SMALL", 0)
    monkeypatch.setattr(select, "select_components", None)
    monkeypatch.setattr(select, "select_count", None)
    large, found = edit(config)
    assert torch.equal(small, large) and found.n_kept == expected.n_kept
    assert found.mass_kept == pytest.approx(expected.mass_kept, abs=1e-14)
