"""Every formula and budget of an edit against a slow float64 computation."""

import math

import pytest
import torch

from lightning_kfac import EditConfig, KFACEditor, collect_factors, collect_moments
from lightning_kfac.editing.formulas import FORMULAS
from tests.common import batched, build_model
from tests.editing.dense import (
    CELLS,
    D_IN,
    D_OUT,
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
@pytest.mark.parametrize("formula", FORMULAS)
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
