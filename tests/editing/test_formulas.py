"""Every formula and budget of an edit against a slow float64 computation."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_factors, collect_moments
from lightning_kfac.editing.formulas import FORMULAS
from tests.common import batched, build_model
from tests.editing.dense import (
    CELLS,
    D_IN,
    D_OUT,
    DOMAIN,
    GENERAL,
    MOMENTS,
    dense_basis,
    dense_importance,
    edit,
    first_cells,
    masked,
    one_layer,
)
from tests.oracle import full_sort_selection


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("formula", [name for name in FORMULAS if name != "rectangle"])
def test_each_formula_equals_a_dense_computation(formula, rho):
    W = one_layer().fc.weight.detach().double()
    lam, U_G, mu, U_A = dense_basis(GENERAL["fc"].A, GENERAL["fc"].G)
    C = U_G.T @ W @ U_A
    product = lam[:, None] * mu
    count = len(full_sort_selection(product, rho))
    if formula == "weights":
        expected = torch.zeros_like(W)
        for cell in first_cells(W**2, count):
            expected[cell] = W[cell]
    elif formula.startswith("svd"):
        k = round(count / 30 * 5) if formula == "svd" else min(5, round(count / (D_OUT + D_IN)))
        u, s, v = torch.linalg.svd(W)
        expected = sum((s[i] * torch.outer(u[:, i], v[i]) for i in range(k)), torch.zeros_like(W))
    elif formula == "lowest":
        order = sorted(CELLS, key=lambda cell: -float(product[cell]))
        expected = masked(C, order[len(order) - count :], U_G, U_A)
    elif formula == "random":
        expected = None
    elif formula == "magnitude":
        expected = masked(C, first_cells(C**2, count), U_G, U_A)
    else:
        S = dense_importance(formula, C, lam, mu, MOMENTS["fc"].double())
        expected = masked(C, full_sort_selection(S, rho), U_G, U_A)
    edited, report = edit(EditConfig(rho=rho, formula=formula), moments=MOMENTS)
    if expected is not None:
        assert (edited - expected).norm() <= 1e-6 * W.norm()  # the cast to float32
    if FORMULAS[formula].control and not formula.startswith("svd"):
        assert report.n_kept == count
    in_basis = U_G.T @ edited.double() @ U_A
    if formula == "random":  # each component is kept or dropped whole
        kept = in_basis.abs() > 1e-6
        assert int(kept.sum()) == count and torch.allclose(in_basis[kept], C[kept], atol=1e-6)


def test_random_depends_on_the_seed_and_the_layer_alone():
    edits = [edit(EditConfig(rho=0.8, formula="random", seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(edits[0], edits[1]) and not torch.equal(edits[0], edits[2])


@pytest.mark.parametrize("formula", [name for name, formula in FORMULAS.items() if formula.mass])
def test_budgets(formula):
    W = one_layer().fc.weight.detach().double()
    lam, U_G, mu, U_A = dense_basis(GENERAL["fc"].A, GENERAL["fc"].G)
    C = U_G.T @ W @ U_A
    S = W**2 if formula == "weights" else dense_importance(formula, C, lam, mu, MOMENTS["fc"].double())
    count = len(full_sort_selection(lam[:, None] * mu, 0.8))
    by_mass = edit(EditConfig(rho=0.8, formula=formula, budget="mass"), moments=MOMENTS)[1]
    by_count = edit(EditConfig(rho=0.8, formula=formula, budget="count"), moments=MOMENTS)[1]
    assert by_mass.n_kept == len(full_sort_selection(S, 0.8)) and by_mass.mass_kept >= 0.8 * (1 - 1e-12)
    assert by_count.n_kept == count
    kept = math.fsum(float(S[cell]) for cell in first_cells(S, count))
    assert by_count.mass_kept == pytest.approx(kept / math.fsum(S.flatten().tolist()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formula", FORMULAS)
def test_the_ends_of_rho(formula, dtype):
    W = one_layer(dtype).fc.weight.detach()
    options = {"moments": MOMENTS}
    assert torch.equal(edit(EditConfig(rho=1.0, formula=formula), dtype, **options)[0], W)
    assert not edit(EditConfig(rho=0.0, formula=formula), dtype, **options)[0].any()
    assert torch.equal(edit(EditConfig(rho=0.0, formula=formula, mode="ablate"), dtype, **options)[0], W)
    assert not edit(EditConfig(rho=1.0, formula=formula, mode="ablate"), dtype, **options)[0].any()


@pytest.mark.parametrize("formula", FORMULAS)
def test_what_is_kept_and_what_is_ablated_make_the_weight(formula):
    W = one_layer().fc.weight.detach()
    kept, ablated = (
        edit(EditConfig(rho=0.8, formula=formula, mode=mode), moments=MOMENTS)[0] for mode in ("suppress", "ablate")
    )
    assert torch.allclose(kept + ablated, W, atol=1e-6)


def test_what_an_ablation_keeps_is_what_stays():
    kept, ablated = (edit(EditConfig(rho=0.8, mode=mode))[1] for mode in ("suppress", "ablate"))
    assert kept.n_kept + ablated.n_kept == kept.n_total
    assert kept.mass_kept + ablated.mass_kept == pytest.approx(1)


def test_corrected_selects_by_the_moments(rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3), blocks=[1], projections=["up"])
    moments = collect_moments(model, batched(rows, 3), factors)
    (name,) = factors
    report = KFACEditor(model, factors, EditConfig(rho=0.6, formula="corrected"), moments=moments).apply(dry_run=True)
    assert report.layers[0].n_kept == len(full_sort_selection(moments[name].double(), 0.6))


@pytest.mark.parametrize(("rho_G", "rho_A"), [(0.5, 0.9), (0.0, 1.0), (1.0, 0.3), (None, 0.7)])
def test_a_rectangle_has_a_share_of_each_side(rho_G, rho_A):
    """By a loop over the spectra; without a share of its own a side has rho."""
    W = one_layer().fc.weight.detach().double()
    lam, U_G, mu, U_A = dense_basis(GENERAL["fc"].A, GENERAL["fc"].G)
    counts = []
    for values, share in ((lam, 0.8 if rho_G is None else rho_G), (mu, rho_A)):
        count, total = 0, 0.0
        while total < share * float(values.sum()) * (1 - 1e-12):
            total += float(values[count])
            count += 1
        counts.append(count if share < 1 else len(values))
    config = EditConfig(rho=0.8, formula="rectangle", rho_G=rho_G, rho_A=rho_A)
    edited, report = edit(config)
    expected = masked(U_G.T @ W @ U_A, [(i, j) for i in range(counts[0]) for j in range(counts[1])], U_G, U_A)
    assert (edited - expected).norm() <= 1e-6 * W.norm() and report.n_kept == counts[0] * counts[1]
    share = float(lam[: counts[0]].sum() / lam.sum() * mu[: counts[1]].sum() / mu.sum())
    assert report.mass_kept == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho_G": 0.5}, "rho_G is of the formula rectangle alone"),
        ({"formula": "rectangle", "rho_A": 1.5}, r"rho_A is 1.5; .* must lie in \[0, 1\]"),
        ({"formula": "rectangle", "budget": "count"}, "formula rectangle keeps a share of each side; leave budget out"),
        ({"formula": "rectangle", "budget": "mass"}, "formula rectangle has no mass|leave budget out"),
    ],
)
def test_wrong_rectangles(settings, message):
    with pytest.raises(InputError, match=message):
        EditConfig(**settings)


def test_coupled_factors_that_were_not_collected():
    plain = {"fc": replace(GENERAL["fc"], A_coupled=None, G_coupled=None)}
    for formula in ("coupled", "coupled_modified", "output_side"):
        with pytest.raises(InputError, match=f"formula {formula} needs coupled factors: collect with collect.coupled"):
            KFACEditor(one_layer(), plain, EditConfig(formula=formula))
    KFACEditor(one_layer(), plain, EditConfig(formula="foof")).apply()


def test_formulas_that_mix():
    """Those of coupled factors in any basis; what is not made of A and G takes no sum of them."""
    domains = {"domain": DOMAIN}
    for formula in ("coupled", "foof"):
        for settings in ({"mix": "scores"}, {"mix": "union"}, {"mix": "scores", "basis": "mixed"}):
            edit(EditConfig(rho=0.7, formula=formula, **settings), domains=domains)
        with pytest.raises(InputError, match=f"adds up A and G, of which formula {formula} is not made"):
            edit(EditConfig(formula=formula, mix="factors"), domains=domains)
    with pytest.raises(InputError, match="formula rectangle has no curvature that is added up: it takes no domain"):
        edit(EditConfig(formula="rectangle"), domains=domains)


@pytest.mark.parametrize("basis", ["general", "mixed"])
def test_a_domain_s_coupled_factors_in_the_basis_of_the_mix(basis):
    W = one_layer().fc.weight.detach().double()
    A, G = GENERAL["fc"].A.double(), GENERAL["fc"].G.double()
    if basis == "mixed":
        A = A / A.trace() + 0.5 * DOMAIN["fc"].A.double() / DOMAIN["fc"].A.double().trace()
        G = G / G.trace() + 0.5 * DOMAIN["fc"].G.double() / DOMAIN["fc"].G.double().trace()
    _, U_G, _, U_A = dense_basis(A, G)
    C = U_G.T @ W @ U_A
    S = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for layer, weight in ((GENERAL["fc"], 1.0), (DOMAIN["fc"], 0.5)):
        r = torch.stack([u @ layer.G_coupled.double() @ u for u in U_G.T])
        c = torch.stack([v @ layer.A_coupled.double() @ v for v in U_A.T])
        part = torch.outer(r, c) / r.sum()
        S += weight * part / part.sum()
    config = EditConfig(rho=0.7, formula="coupled", alpha=0.5, basis=basis, budget="mass")
    edited, _ = edit(config, domains={"domain": DOMAIN})
    assert (edited - masked(C, full_sort_selection(S, 0.7), U_G, U_A)).norm() <= 1e-6 * W.norm()
