"""The edit against a dense float64 computation, the report, and taking it back."""

import copy

import pytest
import torch

from lightning_kfac import (
    EditConfig,
    InputError,
    KFACEditor,
    KroneckerFactors,
    collect_factors,
    load_factors,
    save_factors,
)
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import batched, build_model, projections_of
from tests.oracle import dense_weight, full_sort_selection


@pytest.fixture
def collected(any_model, rows):
    model = copy.deepcopy(any_model)
    return model, collect_factors(model, batched(rows, 3), projections=projections_of(model))


def dense_edit(W, factors, formula, rho):
    """U_G (C * M) U_A^T from numpy-style eigh and a full Python sort."""
    mu, U_A = torch.linalg.eigh(factors.A.double())
    lam, U_G = torch.linalg.eigh(factors.G.double())
    mu, U_A, lam, U_G = mu.flip(0).clamp(min=0), U_A.flip(1), lam.flip(0).clamp(min=0), U_G.flip(1)
    C = U_G.T @ W @ U_A
    S = lam[:, None] * mu[None, :] * (C**2 if formula == "modified" else 1)
    mask = torch.zeros_like(C)
    for i, j in full_sort_selection(S, rho):
        mask[i, j] = 1
    return U_G @ (C * mask) @ U_A.T, int(mask.sum()), (S * mask).sum().item() / S.sum().item()


@pytest.mark.parametrize("formula", ["original", "modified"])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_edit_equals_the_dense_computation(collected, formula, rho):
    model, factors = collected
    layers = dict(model.named_modules())
    expected = {name: dense_edit(dense_weight(layers[name]), f, formula, rho) for name, f in factors.items()}
    before = {name: dense_weight(layers[name]) for name in factors}
    report = KFACEditor(model, factors, EditConfig(rho=rho, formula=formula)).apply()
    for row in report.layers:
        W, n_kept, mass = expected[row.name]
        found = dense_weight(layers[row.name])
        assert (found - W).norm() <= 1e-6 * before[row.name].norm()  # the cast to float32
        assert (row.n_kept, row.n_total) == (n_kept, W.numel())
        assert row.fraction_kept == n_kept / W.numel()
        assert row.mass_kept == pytest.approx(mass, abs=1e-9) and row.mass_kept >= rho * (1 - 1e-9)
        assert row.norm_before == pytest.approx(before[row.name].norm().item(), rel=1e-12)
        assert row.norm_after == pytest.approx(W.norm().item(), rel=1e-6, abs=1e-12)
        change = (W - before[row.name]).norm() / before[row.name].norm()
        assert row.relative_change == pytest.approx(change.item(), rel=1e-5)
    assert report.fraction_kept == pytest.approx(
        sum(n for _, n, _ in expected.values()) / sum(W.numel() for W, _, _ in expected.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rho_one_changes_no_bit_and_restore_gives_every_bit_back(collected, dtype):
    model, factors = collected
    model = model.to(dtype)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = KFACEditor(model, factors, EditConfig(rho=1.0)).apply()
    assert report.fraction_kept == 1 and report.relative_change == 0
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())

    editor = KFACEditor(model, factors, EditConfig(rho=0.5))
    editor.apply()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, original[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in factors)
    editor.restore()
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())


def test_blocks_and_projections_narrow_the_edit(collected):
    model, factors = collected
    report = KFACEditor(model, factors, EditConfig(blocks=[-1], projections=["up"])).apply()
    assert len(report.layers) == 1 and ".2." in report.layers[0].name


def test_layers_without_curvature_are_named_and_nothing_is_changed(rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3), projections=["up"])
    name = list(factors)[-1]
    factors[name] = KroneckerFactors(factors[name].A, torch.zeros_like(factors[name].G), 10)
    original = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=rf"{name}: the importance is zero everywhere"):
        KFACEditor(model, factors).apply()
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


def test_wrong_factors(rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3), projections=["up", "down"])
    with pytest.raises(InputError, match="no factors to edit with"):
        KFACEditor(model, {})
    with pytest.raises(InputError, match=r"another model: it has no layer fc"):
        KFACEditor(model, {"fc": factors["model.layers.0.mlp.up_proj"]})
    with pytest.raises(InputError, match=r"up_proj: the weight is 40 x 24, its factors are for 24 x 40"):
        KFACEditor(model, {"model.layers.0.mlp.up_proj": factors["model.layers.0.mlp.down_proj"]})
    with pytest.raises(InputError, match=r"no factors for projection gate, only for down, up"):
        KFACEditor(model, factors, EditConfig(projections=["gate"]))
    editor = KFACEditor(model, factors)
    editor.apply()
    with pytest.raises(InputError, match="already edited"):
        editor.apply()


@pytest.mark.parametrize("wrong", [{"rho": 1.2}, {"rho": float("nan")}, {"formula": "best"}, {"mode": "drop"}])
def test_wrong_config(wrong):
    with pytest.raises(InputError):
        EditConfig(**wrong)


# -- factor files ------------------------------------------------------------------------------------------


def test_factors_survive_the_disk(tmp_path, rows):
    model = build_model("llama")
    factors = collect_factors(model, batched(rows, 3))
    save_factors(factors, tmp_path / "factors", {"model": "small"})
    loaded = load_factors(tmp_path / "factors")
    assert list(loaded) == list(factors) and loaded.metadata["model"] == "small"
    for name, expected in factors.items():
        found = loaded[name]
        assert torch.equal(found.A, expected.A) and torch.equal(found.G, expected.G)
        assert found.n_tokens == expected.n_tokens
    # gate and up share one A; only triangles are stored
    assert loaded.shared_A("model.layers.0.mlp.gate_proj") == loaded.shared_A("model.layers.0.mlp.up_proj")
    size = sum(f.stat().st_size for f in (tmp_path / "factors").glob("*.safetensors"))
    triangles = 3 * (24 * 25 // 2 + 40 * 41 // 2 + 2 * 40 * 41 // 2 + 24 * 25 // 2)
    assert size < 4 * triangles + 9 * 300
    assert not list(tmp_path.glob("*.part"))


def test_edit_from_the_disk_is_the_same(tmp_path, rows):
    model = build_model("llama")
    factors = collect_factors(model, batched(rows, 3))
    save_factors(factors, tmp_path / "f", {"fingerprint": weights_fingerprint(model, factors), "model": "small"})
    other = copy.deepcopy(model)
    KFACEditor(model, factors).apply()
    KFACEditor(other, load_factors(tmp_path / "f")).apply()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match=r"belong to other weights .* collected on small"):
        KFACEditor(other, load_factors(tmp_path / "f"))


def test_wrong_factor_folders(tmp_path, rows):
    with pytest.raises(InputError, match="not a factor folder"):
        load_factors(tmp_path)
    factors = collect_factors(build_model("olmo2"), batched(rows, 3), blocks=[0], projections=["up"])
    save_factors(factors, tmp_path / "f")
    (tmp_path / "f" / "layer_0000.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match=r"layer_0000\.safetensors: damaged or incomplete: .*; collect"):
        load_factors(tmp_path / "f")["model.layers.0.mlp.up_proj"]
    (tmp_path / "f" / "metadata.json").write_text("{")
    with pytest.raises(InputError, match=r"metadata\.json: damaged or incomplete: "):
        load_factors(tmp_path / "f")
    (tmp_path / "f" / "metadata.json").write_text('{"format": 99, "layers": {}}')
    with pytest.raises(InputError, match="factor format 99"):
        load_factors(tmp_path / "f")


def test_fingerprint():
    model = build_model("olmo2")
    tracked = ["model.layers.1.mlp.up_proj"]
    known = weights_fingerprint(model, tracked)
    assert weights_fingerprint(copy.deepcopy(model), tracked) == known
    rounded = copy.deepcopy(model).bfloat16()
    assert weights_fingerprint(copy.deepcopy(rounded).float(), tracked) == weights_fingerprint(rounded, tracked)
    model.model.layers[1].mlp.up_proj.weight.data[39, 23] += 1e-3
    assert weights_fingerprint(model, tracked) != known
