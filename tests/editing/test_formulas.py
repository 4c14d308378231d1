"""Every formula, budget and mix of an edit against a slow float64 computation."""

import math

import pytest
import torch
from torch import nn

from lightning_kfac import EditConfig, InputError, KFACEditor, KroneckerFactors, select_components, select_products
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.math import selection
from lightning_kfac.math.importance import original
from lightning_kfac.math.mixing import union_of_count
from lightning_kfac.math.selection import select_count
from lightning_kfac.math.spectrum import eigenbasis
from tests.oracle import full_sort_selection

D_OUT, D_IN = 6, 5
CELLS = [(i, j) for i in range(D_OUT) for j in range(D_IN)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(seed: int) -> KroneckerFactors:
    """Factors with a decaying spectrum, as real ones have."""
    made = []
    for size, shift in ((D_IN, 0), (D_OUT, 100)):
        scales = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
        x = torch.randn(40, size, generator=generator(seed + shift), dtype=torch.float64) * scales
        made.append((x.T @ x / 40).float())
    return KroneckerFactors(*made, n_tokens=40)


def one_layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential()
    model.fc = nn.Linear(D_IN, D_OUT, bias=False)
    model.fc.weight.data = torch.randn(D_OUT, D_IN, generator=generator(7)).to(dtype)
    return model


GENERAL, DOMAIN, OTHER = {"fc": random_factors(1)}, {"fc": random_factors(2)}, {"fc": random_factors(3)}
MOMENTS = {"fc": torch.rand(D_OUT, D_IN, generator=generator(5)) ** 3}


def dense_basis(A, G):
    (mu, U_A), (lam, U_G) = torch.linalg.eigh(A.double()), torch.linalg.eigh(G.double())
    return lam.flip(0).clamp(min=0), U_G.flip(1), mu.flip(0).clamp(min=0), U_A.flip(1)


def first_cells(importance, count):
    """The ``count`` largest by Python's stable sort."""
    return sorted(sorted(CELLS, key=lambda cell: -float(importance[cell]))[:count])


def masked(C, cells, U_G, U_A):
    mask = torch.zeros_like(C)
    for cell in cells:
        mask[cell] = 1
    return U_G @ (C * mask) @ U_A.T


def edit(config, weight_dtype=torch.float32, **options):
    model = one_layer(weight_dtype)
    report = KFACEditor(model, GENERAL, config, **options).apply()
    return model.fc.weight.detach(), report.layers[0]


def dense_importance(formula, C, lam, mu, moments=None):
    S = lam[:, None] * mu if not formula.startswith("corrected") else moments
    if formula == "magnitude":
        return C**2
    return S * C**2 if formula.endswith("modified") else S


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


@pytest.mark.parametrize("mix", ["scores", "union", "factors"])
def test_the_ends_of_rho_with_a_domain(mix):
    W = one_layer().fc.weight.detach()
    assert torch.equal(edit(EditConfig(rho=1.0, mix=mix), domains={"sums": DOMAIN})[0], W)
    assert not edit(EditConfig(rho=0.0, mix=mix), domains={"sums": DOMAIN})[0].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formula": "random"}, "is a control and takes no domain"),
        ({"mode": "ablate"}, "give the domain's alone"),
        ({"alpha": {"code": 1.0}}, "alpha names 'code', but the domains are sums"),
        ({"alpha": {}}, "alpha names no domain, not the domain 'sums'"),
        ({"formula": "corrected", "mix": "factors"}, "measured in the general basis"),
    ],
)
def test_mixes_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        edit(EditConfig(rho=0.8, **settings), domains={"sums": DOMAIN})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "factors", "basis": "general"}, "makes a basis of its own"),
        ({"budget": "mass", "formula": "lowest"}, "has no mass"),
        ({"budget": "half"}, "unknown budget 'half'"),
        ({"basis": "own"}, "unknown basis"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"layers": {"0": {"up": 1.5}}}, "layers: block 0, up: rho is 1.5"),
        ({"layers": {"0": {"up": {"rhos": 1}}}}, "unknown field 'rhos'"),
        ({"layers": {"zero": {"up": 0.5}}}, "block 'zero' must be a number"),
        ({"layers": {"0": {"up": 0.5}}, "blocks": [0]}, "leave blocks and projections out"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        EditConfig(**settings)


def blocks_of_layers():
    """Two numbered blocks with a gate and an up projection, and factors of each."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    factors = {}
    for number, block in enumerate(model.layers):
        for name in ("gate_proj", "up_proj"):
            block.add_module(name, one_layer().fc)
            factors[f"layers.{number}.{name}"] = GENERAL["fc"]
    return model, factors


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rho": 0.5, "formula": "random"}, "is a control and takes no domain"),
        ({"rho": 0.5, "formula": "corrected"}, "needs moments measured"),
    ],
)
def test_rules_of_single_layers_are_checked_as_well(rule, message):
    model, factors = blocks_of_layers()
    config = EditConfig(layers={"1": {"up": rule}})
    with pytest.raises(InputError, match=message):
        KFACEditor(model, factors, config, domains={"sums": {name: DOMAIN["fc"] for name in factors}})


def test_layers_by_number_or_text_and_rho_one():
    model, factors = blocks_of_layers()
    report = KFACEditor(model, factors, EditConfig(layers={1: {"up": 0.5, "gate": 1.0}})).apply(dry_run=True)
    assert [layer.name for layer in report.layers] == ["layers.1.up_proj"]
    ablate = EditConfig(layers={"01": {"gate": 1.0}}, mode="ablate")
    KFACEditor(model, factors, ablate).apply()
    assert not model.layers[1].gate_proj.weight.any() and model.layers[1].up_proj.weight.any()


def test_all_experts_of_a_block_have_its_rho():
    model, factors = blocks_of_layers()
    model.layers[0].experts = nn.ModuleList(nn.Module() for _ in range(2))
    for number, expert in enumerate(model.layers[0].experts):
        expert.down_proj = one_layer().fc
        factors[f"layers.0.experts.{number}.down_proj"] = GENERAL["fc"]
    report = KFACEditor(model, factors, EditConfig(layers={"0": {"down": 0.5}})).apply()
    assert [layer.name for layer in report.layers] == [f"layers.0.experts.{n}.down_proj" for n in (0, 1)]


def test_what_an_ablation_keeps_is_what_stays():
    kept, ablated = (edit(EditConfig(rho=0.8, mode=mode))[1] for mode in ("suppress", "ablate"))
    assert kept.n_kept + ablated.n_kept == kept.n_total
    assert kept.mass_kept + ablated.mass_kept == pytest.approx(1)


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="device nowhere: cannot be used here"):
        edit(EditConfig(), device="nowhere")


def test_a_domain_without_curvature_or_of_another_shape():
    empty = {"fc": KroneckerFactors(torch.zeros(D_IN, D_IN), torch.zeros(D_OUT, D_OUT), 1)}
    for mix in ("scores", "factors", "union"):
        with pytest.raises(InputError, match=r"fc: a domain's .* zero everywhere"):
            edit(EditConfig(mix=mix), domains={"sums": empty})
    with pytest.raises(InputError, match="the domain sums has no factors of fc"):
        edit(EditConfig(), domains={"sums": {"other": DOMAIN["fc"]}})
    wrong = {"fc": KroneckerFactors(torch.eye(3), torch.eye(3), 1)}
    with pytest.raises(InputError, match="its factors of fc are for 3 x 3, the general ones for 6 x 5"):
        edit(EditConfig(), domains={"sums": wrong})


# -- selection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [0, 3, 4096])
@pytest.mark.parametrize("seed", range(10))
def test_products_are_selected_exactly_wherever_the_search_ends(monkeypatch, few, seed):
    monkeypatch.setattr(selection, "FEW", few)
    rows = torch.randint(0, 5, (9,), generator=generator(seed)).double().sort(descending=True).values + 1e-9
    columns = torch.rand(7, generator=generator(seed + 50), dtype=torch.float64).sort(descending=True).values
    columns[2] = columns[3]
    for rho in (0.1, 0.5, 0.9, 0.999):
        counts = select_products(rows, columns, rho)
        cells = [(i, j) for i, n in enumerate(counts.tolist()) for j in range(n)]
        assert cells == full_sort_selection(original(rows, columns), rho)


@pytest.mark.parametrize("scale", [1e-310, 1e-160, 1e150])
def test_products_that_underflow_or_are_huge(scale):
    rows = torch.tensor([7.0, 3.0, 2.0, 0.0], dtype=torch.float64) * scale
    columns = torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64) * min(1 / scale, 1e300)
    counts = select_products(rows, columns, 0.9)
    cells = [(i, j) for i, n in enumerate(counts.tolist()) for j in range(n)]
    assert cells == full_sort_selection(original(rows, columns), 0.9)


@pytest.mark.parametrize("rho", [0.01, 0.3, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("seed", range(5))
def test_components_are_selected_as_by_a_stable_sort(rho, seed):
    """Twelve powers of ten, many equal entries, zeros."""
    values = 10.0 ** torch.randint(-6, 6, (40, 30), generator=generator(seed)).double()
    values *= torch.randint(0, 4, (40, 30), generator=generator(seed + 1))
    flat = values.flatten()
    descending, order = flat.sort(descending=True, stable=True)
    n = int((descending.cumsum(0) < rho * flat.sum() * (1 - 1e-12)).sum()) + 1
    expected = torch.zeros_like(flat, dtype=torch.bool)
    expected[order[:n]] = True
    assert torch.equal(select_components(values, rho), expected.view(40, 30))
    assert torch.equal(select_count(values, n), expected.view(40, 30))


def test_the_ends_of_a_count():
    values = torch.ones(3, 2)
    assert not select_count(values, 0).any() and select_count(values, 6).all()
    assert select_count(values, 3).tolist() == [[True, True], [True, False], [False, False]]


def test_a_union_never_exceeds_rho():
    importances = [torch.rand(6, 5, generator=generator(s), dtype=torch.float64) for s in (1, 2)]
    keep = union_of_count(importances, 0.3, 30)
    assert torch.equal(keep, select_components(importances[0], 0.3) | select_components(importances[1], 0.3))


# -- bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(8, 8),  # rank one
        torch.zeros(8, 8),
        torch.eye(8) * 1e30,
        torch.eye(8) * 1e-30,
        torch.tensor([[3.0]]),
        torch.diag(torch.tensor([1.0, 0.0, 0.0, 1e-20])),
    ],
    ids=["rank one", "zero", "huge", "tiny", "1 x 1", "deficient"],
)
def test_eigenbasis_of_difficult_matrices(matrix, dtype):
    values, vectors = eigenbasis(matrix, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert vectors.dtype == dtype and values.dtype == torch.float64
    assert (values >= 0).all() and (values.diff() <= 0).all()
    rebuilt = vectors.double() @ torch.diag(values) @ vectors.double().T
    assert (rebuilt - matrix.double()).norm() <= tolerance * max(matrix.double().norm(), 1e-300)
    assert (vectors.double().T @ vectors.double() - torch.eye(len(matrix))).norm() <= 10 * tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigenbasis_refuses_what_is_not_finite(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(InputError, match="A of fc has NaN or infinite entries"):
        eigenbasis(matrix, "A of fc")


def test_eigenbasis_refuses_a_clearly_negative_eigenvalue_and_clamps_rounding():
    with pytest.raises(InputError, match=r"A of fc has the eigenvalue -0\.5 beside a largest of 2"):
        eigenbasis(torch.diag(torch.tensor([2.0, -0.5])), "A of fc")
    assert eigenbasis(torch.diag(torch.tensor([2.0, -1e-8]))).values.tolist() == [2.0, 0.0]


def test_a_float32_solver_that_fails_is_followed_by_jitter_and_float64(monkeypatch):
    solve, tried = torch.linalg.eigh, []

    def float64_only(matrix):
        tried.append((matrix.dtype, float(matrix.diagonal().sum())))
        if matrix.dtype == torch.float32:
            raise RuntimeError("CUSOLVER_STATUS_INVALID_VALUE")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", float64_only)
    values, vectors = eigenbasis(torch.diag(torch.tensor([4.0, 1.0])), dtype=torch.float32)
    assert [dtype for dtype, _ in tried] == [torch.float32, torch.float32, torch.float64]
    assert tried[1][1] > tried[0][1]  # the second with jitter
    assert values.tolist() == pytest.approx([4, 1], rel=1e-5) and vectors.dtype == torch.float32


def test_a_solver_that_returns_nan_is_not_believed(monkeypatch):
    solve, calls = torch.linalg.eigh, []

    def nan_first(matrix):
        calls.append(1)
        values, vectors = solve(matrix)
        return (values * float("nan"), vectors) if len(calls) == 1 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", nan_first)
    assert eigenbasis(torch.eye(2)).values.tolist() == pytest.approx([1, 1], rel=1e-8)
