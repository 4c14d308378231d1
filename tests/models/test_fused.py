"""Rows of fused weights are the projections that they are said to be, and are tracked and edited apart."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import EditConfig, KFACEditor, collect_factors
from lightning_kfac.models.fused import LAYOUTS, FusedRows
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.targets import resolve_targets
from tests.common import batched, generator, relative_error
from tests.oracle import one_row_factors

VOCAB = 61
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
WIDTH = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDTH | {"num_key_value_heads": 2}
GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
GRANITE = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 40}
# Model type and settings of each family, and its fused weights.
FAMILIES = {
    "phi3": ("phi3", GROUPED, ["gate_up_proj", "qkv_proj"]),
    "glm": ("glm", GROUPED | {"head_dim": 6}, ["gate_up_proj"]),
    "glm4": ("glm4", GROUPED | {"head_dim": 6}, ["gate_up_proj"]),
    "granitemoeshared": ("granitemoeshared", GRANITE, ["input_linear"]),
    "gpt2": ("gpt2", GPT, ["c_attn"]),
    "openai-gpt": ("openai-gpt", GPT, ["c_attn"]),
    "gpt_bigcode": ("gpt_bigcode", GPT | {"multi_query": True}, ["c_attn"]),
    "gpt_bigcode_heads": ("gpt_bigcode", GPT | {"multi_query": False}, ["c_attn"]),
    "gpt_neox": ("gpt_neox", WIDTH, ["query_key_value"]),
    "gpt_neox_japanese": ("gpt_neox_japanese", WIDTH, ["query_key_value"]),
    "bloom": ("bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 4}, ["query_key_value"]),
    "persimmon": ("persimmon", WIDTH | {"hidden_size": 32, "qk_layernorm": False}, ["query_key_value"]),
    "falcon": ("falcon", WIDTH | {"new_decoder_architecture": True, "num_kv_heads": 2}, ["query_key_value"]),
    "falcon_multi_query": ("falcon", WIDTH | {"multi_query": True}, ["query_key_value"]),
    "falcon_heads": ("falcon", WIDTH | {"multi_query": False}, ["query_key_value"]),
    "codegen": ("codegen", GPT | {"n_inner": None, "rotary_dim": 4}, ["qkv_proj"]),
    "mpt": ("mpt", {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, ["Wqkv"]),
    "dbrx": (
        "dbrx",
        {
            "d_model": 24,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
        },
        ["Wqkv"],
    ),
    "minimax": (
        "minimax",
        GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 6},
        ["qkv_proj"],
    ),
}
ROWS = [torch.randint(1, VOCAB, (n,), generator=generator(n)).tolist() for n in (8, 5, 3)]


def build(family):
    kind, settings, _ = FAMILIES[family]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if hasattr(config, "num_local_experts"):
        model.set_experts_implementation("eager")  # others know no float64
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 4, std=0.15)
    torch.set_rng_state(state)
    return model


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
        behind["up"] = r"mlp\.(down_proj|output_linear)"
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


def test_every_layout_is_tried():
    tried = {type(m).__name__ for family in FAMILIES for m in build(family).modules()} & set(LAYOUTS)
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
        "Zamba2MLP",
    }
