"""Rows of fused weights are the projections that they are said to be, and are tracked and edited apart."""

import pytest
import torch

from lightning_kfac import EditConfig, KFACEditor, collect_factors
from lightning_kfac.models.fused import LAYOUTS, FusedRows
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.targets import projection_of, resolve_targets
from tests.common import VOCAB, batched, generator, relative_error
from tests.families import FUSED as FAMILIES
from tests.families import build_any
from tests.families import build_fused as build
from tests.oracle import one_row_factors

GATED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
SINGLE = (*GATED, "jetmoe")
ROWS = [torch.randint(1, VOCAB, (n,), generator=generator(n)).tolist() for n in (8, 5, 3)]


def fused(model):
    return {name: layer for name, layer in find_layers(model).items() if isinstance(layer, FusedRows)}


def logits(model):
    with torch.no_grad():
        return model.double()(input_ids=torch.tensor(ROWS[:1]), use_cache=False).logits


def scale(layer, factor):
    """Multiplies rows, and their biases."""
    layer.write(layer.parameter.data, layer.W * factor)
    if (bias := getattr(layer.module, "bias", None)) is not None:
        layer.rows.take(bias.data, 0).mul_(factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_they_are_called(family):
    """q times c and k over c changes no score; v times c, or up times c, is undone behind it. Nothing else is."""
    model = build(family)
    layers = fused(model)
    assert {name.split(".")[-2] for name in layers} == set(FAMILIES[family][2])
    before = logits(model)
    for block in (0, 1):
        mine = {name.rpartition(".")[2]: layer for name, layer in layers.items() if f".{block}." in name}
        after = {name: layer for name, layer in find_layers(model).items() if f".{block}." in name}
        if {"q", "k"} <= set(mine) and family != "minimax":  # it has an activation on q, k and v
            scale(mine["q"], 2), scale(mine["k"], 0.5)
            assert torch.allclose(logits(model), before, atol=1e-9)
            scale(mine["q"], 0.5), scale(mine["k"], 2)
        behind = {
            "v": r"(self_attn|self_attention|attn|attention|norm_attn_norm\.attn)\.(o_proj|dense|c_proj|out_proj)"
        }
        behind["up"] = r"mlp\.(down_proj|output_linear|fc2|Wo)"
        for which, pattern in behind.items():
            if which not in mine or family == "minimax":
                continue
            others = [n for n in mine if n != which]
            (down,) = resolve_targets(
                model, modules=[rf".*\.{block}\..*{pattern}|.*\.{block}\.shared_{pattern}"]
            ).values()
            assert down.name in after
            for changed in mine:
                scale(mine[changed], 2)
                down.write(down.parameter.data, down.W / 2)
                same = torch.allclose(logits(model), before, atol=1e-9)
                assert same == (changed == which), (changed, which, others)
                down.write(down.parameter.data, down.W * 2)
                scale(mine[changed], 0.5)
    assert torch.allclose(logits(model), before, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_rows(family):
    """One A, and as G the block of the whole G, all against float64 autograd."""
    model = build(family)
    names = list(fused(model))
    found = collect_factors(
        model, batched(ROWS, 3), modules=[name.replace(".", r"\.") for name in names], labels="gold"
    )
    assert list(found) == names
    wholes = sorted({name.rpartition(".")[0] for name in names})
    oracle = one_row_factors(model, wholes, ROWS, [row[1:] for row in ROWS])
    rows = {name: layer.rows for name, layer in fused(model).items()}
    for whole in wholes:
        A, G, n = oracle[whole]
        taken = torch.zeros(len(G), dtype=torch.long)
        for name in (name for name in names if name.rpartition(".")[0] == whole):
            index = rows[name].take(torch.arange(len(G)), 0).flatten()
            taken[index] += 1
            assert found[name].n_tokens == n
            assert relative_error(found[name].A, A) < 1e-5
            assert relative_error(found[name].G, G[index][:, index]) < 1e-5
            assert found[name].A is found[f"{whole}.{'gate' if f'{whole}.gate' in found else 'q'}"].A
        assert (taken == 1).all()  # every row is of one projection


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "falcon", "codegen"])
def test_an_edit_touches_its_own_rows_alone(family):
    model = build(family)
    names = [name for name in fused(model) if name.endswith((".k", ".up"))]
    factors = collect_factors(model, batched(ROWS, 3), modules=[name.replace(".", r"\.") for name in names])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor = KFACEditor(model, factors, EditConfig(rho=0.5))
    editor.apply()
    layers = fused(model)
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        inside = torch.zeros_like(changed)
        for edited in names:
            if layers[edited].parameter_name == name:
                layers[edited].part(inside).fill_(True)
        assert not (changed & ~inside).any(), name
        assert changed.any() == inside.any()
    editor.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_weight_that_is_chosen_whole_is_not_tracked_in_parts():
    model = build("phi3")
    whole = resolve_targets(model, modules=[r".*gate_up_proj.*"])
    assert list(whole) == [f"model.layers.{b}.mlp.gate_up_proj" for b in (0, 1)]
    parts = resolve_targets(model, modules=[r".*gate_up_proj\..*"])
    assert list(parts) == [f"model.layers.{b}.mlp.gate_up_proj.{p}" for b in (0, 1) for p in ("gate", "up")]


@pytest.mark.parametrize("family", GATED)
def test_queries_beside_the_gate_of_their_output(family):
    """A norm undoes every factor on q, but none on the gate; and an edit of q leaves the gate alone."""
    model = build_any(family)
    model.set_experts_implementation("eager")  # others know no float64
    (name, q), *others = fused(model).items()
    assert name == "model.layers.1.self_attn.q_proj.q" and not others
    assert projection_of(name) == "q" and list(resolve_targets(model, [1], ["q"])) == [name]
    rows = q.rows.take(torch.arange(len(q.parameter)), 0).flatten()
    gate = torch.tensor([row for row in range(len(q.parameter)) if row not in rows])
    assert len(rows) == len(gate)
    before = logits(model)
    with torch.no_grad():
        q.parameter[rows] *= 2
        assert torch.allclose(logits(model), before, atol=1e-6)  # the norm adds 1e-6
        q.parameter[rows] /= 2
        q.parameter[gate] *= 2
        assert not torch.allclose(logits(model), before, atol=1e-3)


def test_keys_and_values_alone_in_a_weight():
    """JetMoE's queries and outputs are experts."""
    model = build_any("jetmoe").double()
    before = logits(model)
    for block, layer in enumerate(model.model.layers):
        experts = layer.self_attention.experts
        for which, other in (("k", experts.input_linear), ("v", experts.output_linear)):
            (part,) = resolve_targets(model, [block], [which]).values()
            scale(part, 2)
            assert not torch.allclose(logits(model), before, atol=1e-6)
            other.weight.data.div_(2)
            assert torch.allclose(logits(model), before, atol=1e-9)


def test_every_layout_is_tried():
    tried = {type(m).__name__ for family in FAMILIES for m in build(family).modules()} & set(LAYOUTS)
    tried |= {type(m).__name__ for family in SINGLE for m in build_any(family).modules()} & set(LAYOUTS)
    # The rest are parts of multimodal or hybrid models, with the layout of one that is tried.
    untried = set(LAYOUTS) - tried
    assert untried == {
        "DiaMLP",
        "FalconFlashAttention2",
        "GraniteMoeHybridMLP",
        "GraniteMoeSWAMLP",
        "MiniMaxM3VLDenseMLP",
        "Phi4MultimodalAttention",
        "Phi4MultimodalMLP",
        "Qwen4ExpTextAttention",
        "Zamba2MLP",
    }
