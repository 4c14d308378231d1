"""Edits of experts: of each its own slice, of none that text did not reach."""

import json

import pytest
import torch

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_factors, load_factors, save_factors
from lightning_kfac.editing.experts import sort_experts
from lightning_kfac.editing.patch import apply_patch, save_patch
from lightning_kfac.factors.kronecker import pooled_input
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import batched, generator, relative_error
from tests.mixtures import build_mixture, projections


def collected(model, family="olmoe", lengths=(9, 5, 12, 7)):
    rows = [torch.randint(1, 61, (n,), generator=generator(n)).tolist() for n in lengths]
    return collect_factors(model, batched(rows, 2), projections=projections(family))


def own(model, name):
    """The slice of a parameter that a key names, by hand: [d_out, d_in]."""
    experts, _, rest = name.partition(".experts.")
    leaf, expert, *which = rest.split(".")
    weight = model.get_parameter(f"{experts}.experts.{leaf}").detach()[int(expert)]
    if type(model.get_submodule(f"{experts}.experts")).__name__ in ("GptOssExperts", "Llama4TextExperts"):
        weight = weight.T
    if not which:
        return weight
    if type(model.get_submodule(f"{experts}.experts")).__name__ == "GptOssExperts":
        return weight[("gate", "up").index(which[0]) :: 2]
    half = len(weight) // 2
    return weight[:half] if which == ["gate"] else weight[half:]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_edit_restore_and_patch(family, tmp_path):
    model = build_mixture(family)
    factors = collected(model, family)
    save_factors(factors, tmp_path / "factors", {})
    loaded = load_factors(tmp_path / "factors")
    assert {name: f.n_tokens for name, f in loaded.items()} == {name: f.n_tokens for name, f in factors.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = {name: own(model, name).clone() for name in factors}
    unedited = weights_fingerprint(model, list(factors))
    editor = KFACEditor(model, loaded, EditConfig(rho=0.6, expert_min_tokens=1))
    report = editor.apply()
    for layer in report.layers:
        A, G = factors[layer.name].A.double(), factors[layer.name].G.double()
        U_G, U_A = (torch.linalg.eigh(factor)[1] for factor in (G, A))
        C = U_G.T @ old[layer.name].double() @ U_A
        kept = U_G.T @ own(model, layer.name).double() @ U_A
        same = (kept - C).abs() < 1e-5
        assert (same | (kept.abs() < 1e-5)).all(), layer.name
        assert same.sum() >= layer.n_kept
        assert 0 < layer.fraction_kept < 1
    touched = {name.partition(".experts.")[0] for name in factors}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (
            ".experts." in name and name.partition(".experts.")[0] in touched and "bias" not in name
        ), name
    names = [layer.name for layer in report.layers]
    save_patch(model, names, tmp_path / "patch", unedited, {})
    edited = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    apply_patch(model, tmp_path / "patch")
    assert all(torch.equal(p, edited[name]) for name, p in model.named_parameters())


def test_an_expert_that_nothing_came_to_keeps_every_bit():
    model = build_mixture("olmoe")
    factors = collect_factors(model, batched([[1, 2]], 1), projections=["expert_gate", "expert_up", "expert_down"])
    idle = {name for name, f in factors.items() if not f.n_tokens}
    assert len(idle) == 2 * 2 * 3  # one token, two of four experts a block
    old = {name: own(model, name).clone() for name in factors}
    report = KFACEditor(model, factors, EditConfig(rho=0.3, expert_min_tokens=0)).apply()
    assert set(report.unedited) == idle and not set(report.unedited.values()) - {0}
    for name in factors:
        assert torch.equal(own(model, name), old[name]) == (name in idle), name
    assert json.loads(json.dumps(report.to_dict()))["unedited"] == report.unedited


def test_experts_with_few_tokens_stay_by_default():
    model = build_mixture("olmoe")
    factors = collected(model, lengths=(30,) * 8)
    counts = {name: f.n_tokens for name, f in factors.items()}
    few = {name: n for name, n in counts.items() if n < 40}  # the larger of 24 and 40
    enough = set(counts) - set(few)
    report = KFACEditor(model, factors, EditConfig()).apply(dry_run=True)
    assert report.unedited == few and {layer.name for layer in report.layers} == enough
    most = max(counts.values())
    with pytest.raises(InputError, match=rf"no expert has enough tokens.*has {most}, the most.*expert_min_tokens"):
        KFACEditor(model, factors, EditConfig(expert_min_tokens=most + 1))


def test_a_dense_layer_has_no_minimum():
    model = build_mixture("deepseek_v3")
    rows = [[1, 2, 3]]
    factors = collect_factors(model, batched(rows, 1), projections=["gate", "expert_gate"])
    report = KFACEditor(model, factors, EditConfig()).apply()
    assert [layer.name for layer in report.layers] == ["model.layers.0.mlp.gate_proj"] and len(report.unedited) == 4


def test_experts_borrow_the_inputs_of_their_layer():
    model = build_mixture("olmoe")
    factors = collected(model)
    config = EditConfig(rho=0.5, expert_min_tokens=1000, expert_inputs="layer")
    reached = {name for name, f in factors.items() if f.n_tokens}
    old = {name: own(model, name).double() for name in factors}
    report = KFACEditor(model, factors, config).apply()
    assert {layer.name for layer in report.layers} == reached
    for layer in report.layers:
        head, _, tail = layer.name.partition(".experts.")
        leaf, _, *which = tail.split(".")
        beside = [".".join([f"{head}.experts", leaf, str(e), *which]) for e in range(4)]
        tokens = sum(factors[name].n_tokens for name in beside)
        A = sum(factors[name].A.double() * factors[name].n_tokens for name in beside) / tokens
        U_A = torch.linalg.eigh(A)[1]
        U_G = torch.linalg.eigh(factors[layer.name].G.double())[1]
        C = U_G.T @ old[layer.name] @ U_A
        kept = U_G.T @ own(model, layer.name).double() @ U_A
        # The basis is of a float32 mean; nearly equal eigenvalues turn its vectors.
        assert ((kept - C).abs() < 1e-3).logical_or(kept.abs() < 1e-3).all()


def test_pooled_input_is_the_mean_over_tokens():
    factors = collected(build_mixture("olmoe"))
    names = [f"model.layers.1.mlp.experts.down_proj.{e}" for e in range(4)]
    tokens = sum(factors[name].n_tokens for name in names)
    expected = sum(factors[name].A.double() * factors[name].n_tokens for name in names) / tokens
    assert relative_error(pooled_input(factors, names), expected) < 1e-6


def test_wrong_borrowing():
    model = build_mixture("olmoe")
    factors = collected(model)
    config = EditConfig(expert_min_tokens=1000, expert_inputs="layer")
    with pytest.raises(InputError, match="expert_inputs layer takes no domain"):
        KFACEditor(model, factors, config, domains={"other": factors})
    with pytest.raises(InputError, match="unknown expert_inputs 'all'; choose from own, layer"):
        EditConfig(expert_inputs="all")
    with pytest.raises(InputError, match="expert_min_tokens is -1; it must not be negative"):
        EditConfig(expert_min_tokens=-1)
    owners = dict.fromkeys(factors, 0)
    with pytest.raises(InputError, match="expert_inputs layer needs all factors on every rank"):
        KFACEditor(model, factors, config, owners=owners)


def test_sort_experts_without_experts():
    assert not sort_experts({}, {}, EditConfig()).unedited
