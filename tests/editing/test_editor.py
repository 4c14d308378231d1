"""The edit against a dense float64 computation, the report, and taking it back."""

import copy

import pytest
import torch

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_factors, load_factors, save_factors
from lightning_kfac.editing import editor as editor_module
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import batched, build_model
from tests.oracle import dense_weight, full_sort_selection


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


def test_an_edit_that_is_stopped_half_way_changes_nothing(collected, monkeypatch):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    editor, done = KFACEditor(model, factors, EditConfig(rho=0.5)), []
    edit = editor_module.edit_layer

    def stop_at_the_third(*args):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return edit(*args)

    monkeypatch.setattr(editor_module, "edit_layer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        editor.apply()
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert editor.apply().layers  # and can be done again


def test_dry_run_reports_and_touches_nothing(collected):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    editor = KFACEditor(model, factors, EditConfig(rho=0.5))
    dry = editor.apply(dry_run=True)
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert editor.apply().layers == dry.layers and 0 < dry.relative_change < 1


def test_float32_bases_give_nearly_the_same_edit(collected):
    model, factors = collected
    name = next(iter(factors))
    exact = KFACEditor(model, factors, EditConfig(rho=0.7))
    exact.apply()
    expected = model.get_submodule(name).weight.clone()
    exact.restore()
    KFACEditor(model, factors, EditConfig(rho=0.7), dtype="float32").apply()
    found = model.get_submodule(name).weight
    assert (found - expected).norm() <= 1e-3 * expected.norm()  # at most a component at the threshold differs
