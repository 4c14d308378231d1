"""What cannot be edited is named before anything is changed."""

import copy

import pytest
import torch
from torch import nn

from lightning_kfac import (
    EditConfig,
    InputError,
    KFACEditor,
    KroneckerFactors,
    collect_factors,
    load_factors,
    save_factors,
)
from tests.common import batched, build_model
from tests.editing.dense import D_IN, D_OUT, DOMAIN, GENERAL, edit, one_layer


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
    report = KFACEditor(model, factors, EditConfig(layers={"0": {"expert_down": 0.5}})).apply()
    assert [layer.name for layer in report.layers] == [f"layers.0.experts.{n}.down_proj" for n in (0, 1)]


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


def test_factors_of_text_that_different_tokenizers_cut_are_not_mixed(tmp_path):
    for name, factors, tokenizer in (
        ("general", GENERAL, "a" * 64),
        ("same", DOMAIN, "a" * 64),
        ("other", DOMAIN, "b" * 64),
        ("earlier", DOMAIN, None),
    ):
        save_factors(factors, tmp_path / name, {"tokenizer_fingerprint": tokenizer})
    general, *domains = (load_factors(tmp_path / name) for name in ("general", "same", "other", "earlier"))
    same, other, earlier = domains
    config = EditConfig(rho=0.8)
    for domain in (same, earlier, DOMAIN):
        assert not KFACEditor(one_layer(), general, config, domains={"sums": domain}).forced
    message = r"the domain sums \(.*other\) is of other tokens than the general factors \(.*general\): .* b{8} and a{8}"
    with pytest.raises(InputError, match=message):
        KFACEditor(one_layer(), general, config, domains={"sums": other})
    assert KFACEditor(one_layer(), general, config, domains={"sums": other}, force=True).apply().forced
