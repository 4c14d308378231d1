"""Which layers an option chooses, and what is refused."""

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig

from lightning_kfac import InputError
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import block_of, count_blocks, projection_of, resolve_targets
from tests.common import build_model
from tests.families import build_any
from tests.forks import ROOT
from tests.mixtures import build_mixture

# Config values of the published checkpoints.
FULL_SIZE = {
    "olmo2_1b": {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 16, "vocab_size": 100352},
    "olmo2_7b": {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "vocab_size": 100352},
    "llama3_8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen3_8b": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip


PUBLISHED = {"olmo2_1b": [11, 12, 13], "olmo2_7b": [23, 24, 25]}
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_architectures(name):
    settings = FULL_SIZE[name]
    collect = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["collect"]
    blocks = collect["blocks"]
    assert (blocks, collect["projections"]) == (PUBLISHED.get(name, blocks), ["gate", "up"])
    config = AutoConfig.for_model(**settings)
    model = skeleton(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    targets = resolve_targets(model, blocks, ["gate", "up"])
    assert list(targets) == [f"model.layers.{b}.mlp.{p}_proj" for b in blocks for p in ("gate", "up")]
    for layer in targets.values():
        assert layer.shape == (settings["intermediate_size"], settings["hidden_size"])
    everything = resolve_targets(model, "all", ["gate", "up", "down", "q", "k", "v", "o"])
    assert len(everything) == 7 * settings["num_hidden_layers"]


def test_negative_blocks_and_model_order():
    model = build_model("olmo2")
    assert list(resolve_targets(model, [-1, 0], ["down", "up"])) == [
        f"model.layers.{b}.mlp.{p}_proj" for b in (0, 2) for p in ("up", "down")
    ]


def test_gpt2_names():
    model = build_model("gpt2")
    targets = resolve_targets(model, [1], ["up", "down", "o"])
    assert list(targets) == [f"transformer.h.1.{n}" for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert targets["transformer.h.1.mlp.c_fc"].shape == (40, 24)
    fused = resolve_targets(model, modules=[r".*\.c_attn"])
    assert len(fused) == 3


def test_modules_by_regular_expression():
    model = build_model("llama")
    assert list(resolve_targets(model, modules=[r"lm_head", r"model\.layers\.0\..*q_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": [3]}, r"block 3 does not exist; the model has blocks 0 to 2"),
        ({"blocks": [-4]}, r"block -4 does not exist"),
        ({"blocks": []}, r"blocks must be 'all' or a list"),
        ({"projections": ["gat"]}, r"unknown projection 'gat'; choose from gate, up, down, q, k, v, o"),
        ({"projections": []}, r"no projection chosen"),
        ({"modules": [r".*\.gate"]}, r"matches no layer. Layers are named like model\.layers\.0"),
        ({"modules": [r"model\.norm"]}, r"matches model\.norm, a Olmo2RMSNorm; only Linear and Conv1D"),
        ({"modules": ["("]}, r"not a regular expression"),
        ({"modules": []}, r"the list is empty"),
    ],
)
def test_wrong_targets(arguments, message):
    with pytest.raises(InputError, match=message):
        resolve_targets(build_model("olmo2"), **arguments)


def test_wrong_gpt2_has_no_gate():
    with pytest.raises(InputError, match=r"no projection 'gate'; it has down, k, o, q, up, v. .*`modules`"):
        resolve_targets(build_model("gpt2"), projections=["gate"])


def test_wrong_fused_weight_of_a_layout_that_is_not_known():
    class NewAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = nn.Linear(4, 12)

    model = nn.Module()
    model.layers = nn.ModuleList([NewAttention()])
    message = r"qkv_proj fuses q, k and v in a way that is not known here: track it whole with `modules: .*qkv_proj"
    with pytest.raises(InputError, match=message):
        resolve_targets(model, projections=["q"])
    assert list(resolve_targets(model, modules=[r".*\.qkv_proj"])) == ["layers.0.qkv_proj"]


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.attn.attention.out_proj", "o"),
        ("model.layers.1.self_attn.dense", "o"),
        ("transformer.h.1.self_attention.dense", "o"),
        ("gpt_neox.layers.1.attention.dense", "o"),
        ("transformer.blocks.1.norm_attn_norm.attn.out_proj", "o"),
        ("roformer.encoder.layer.1.attention.output.dense", "o"),
        ("roformer.encoder.layer.1.output.dense", "down"),
        ("roformer.encoder.layer.1.attention.self.query", "q"),
        ("backbone.layers.1.mixer.out_proj", None),  # of a recurrence, not of attention
        ("model.layers.1.mlp.gate", None),  # a router
        ("model.layers.1.mlp.shared_expert_gate", None),
        ("model.layers.1.mlp.shared_experts.up_proj", "shared_up"),
        ("model.layers.1.shared_mlp.input_linear.gate", "shared_gate"),
        ("model.layers.1.shared_mlp.output_linear", "shared_down"),
        ("model.layers.1.mlp.experts.3.gate_proj", "expert_gate"),
        ("model.layers.1.mlp.experts.gate_up_proj.3.gate", "expert_gate"),
        ("model.layers.1.mlp.experts.down_proj.3", "expert_down"),
        ("model.layers.1.mlp.experts.up_proj.3", "expert_up"),
        ("model.layers.1.self_attn.qkv_proj", None),
        ("model.layers.1.self_attn.gate_proj", None),  # of the attention's output
        ("model.layers.1.self_attn.compressor.gate_proj", None),
        ("model.layers.1.input_layernorm.mlp.fc1", None),
        ("model.layers.1.mlp.gate.router_mlp.fc1", None),
        ("roberta_prelayernorm.encoder.layer.1.intermediate.dense", "up"),
        ("transformer.h.1.multi_head_attention.Wq", "q"),
        ("transformer.h.1.multi_head_attention.dense", "o"),
        ("transformer.h.1.ffn.2", "down"),
        ("transformer.attentions.1.out_lin", "o"),
        ("transformer.ffns.1.lin1", "up"),
        ("model.layers.1.mlp.fc1.gate", "gate"),
        ("model.layers.1.mlp.fc1", "up"),
        ("model.layers.1.self_attn.v_proj.linear", "v"),
    ],
)
def test_names_of_projections(name, projection):
    assert projection_of(name) == projection
    assert block_of(name) in (0, 1)


@pytest.mark.parametrize("family", ["afmoe", "hrm_text", "hy_v4"])
def test_the_gate_of_an_attention_is_not_that_of_the_mlp(family):
    assert {name.split(".")[-2] for name in resolve_targets(build_any(family), [0], ["gate"])} == {"mlp"}


def test_a_weight_that_is_known_in_parts_is_no_projection():
    """Moshi's fc1 is gate and up; that of others is up."""
    names = list(resolve_targets(build_any("moshi"), [0], ["up"]))
    assert names == ["model.layers.0.mlp.fc1.up"]


def test_a_vision_tower_has_no_say():
    """Text never runs through it: neither its layers nor the number of its blocks count."""
    model = build_model("olmo2")
    tower = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 4)})}) for _ in range(5))
    model.model.vision_tower = nn.ModuleDict({"layers": tower})
    model.model.get_decoder = lambda: model.model.layers
    chosen = resolve_targets(model, [-1], ["up"])
    assert list(chosen) == ["model.layers.2.mlp.up_proj"]
    with pytest.raises(InputError, match="block 4 does not exist; the model has blocks 0 to 2"):
        resolve_targets(model, [4], ["up"])
    with pytest.raises(InputError, match=r"vision_tower\.layers\.0\.mlp\.fc1 is among them, which text never runs"):
        resolve_targets(model, modules=[r".*fc1"])


def test_wrong_packed_weights():
    model = build_model("olmo2")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is a Linear with weights of uint8 \[480, 1\]: load"):
        resolve_targets(model, [1], ["up"])
    layer.weight = nn.Parameter(torch.zeros(12, 40), requires_grad=False)
    with pytest.raises(InputError, match=r"weights of float32 \[12, 40\], not \[40, 24\]"):
        resolve_targets(model, [1], ["up"])
    layer.weight = nn.Parameter(torch.zeros(40, 24).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"weights of float8_e4m3fn"):
        resolve_targets(model, modules=[r".*1\.mlp\.up_proj"])


def test_wrong_model_without_blocks():
    with pytest.raises(InputError, match="no numbered blocks"):
        resolve_targets(nn.Sequential(nn.Linear(2, 2)))


def test_blocks_of_a_vision_tower_do_not_count():
    """A negative block is counted from the end of the text's own."""
    model = nn.ModuleDict({name: nn.ModuleDict({"layers": nn.ModuleList()}) for name in ("vision", "text")})
    model["vision"]["layers"].extend(nn.Sequential(nn.Linear(2, 2)) for _ in range(5))
    model["text"]["layers"].extend(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    assert count_blocks(model) == 5
    model.get_decoder = lambda: model["text"]
    assert count_blocks(model) == 3
    model.get_decoder = lambda: nn.Linear(2, 2)  # one that has no blocks says nothing
    assert count_blocks(model) == 5


def test_all_projections_of_the_mlps_that_there_are():
    """GPT-2 has no gate; a mixture's experts have to be named."""
    gpt2 = resolve_targets(build_model("gpt2", n_layer=2), [1])
    assert {projection_of(name) for name in gpt2} == {"up", "down"}
    assert gpt2.keys() == resolve_targets(build_model("gpt2", n_layer=2), [1], ["up", "down"]).keys()
    with pytest.raises(InputError, match="choose `expert_gate`"):
        resolve_targets(build_mixture("olmoe"))
    dense = build_model("olmo2")
    assert resolve_targets(dense).keys() == resolve_targets(dense, "all", ["gate", "up", "down"]).keys()
