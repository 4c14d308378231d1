"""Which layers an option chooses, and what is refused."""

import pytest
import yaml
from torch import nn
from transformers import AutoConfig

from lightning_kfac import InputError
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import resolve_targets
from tests.common import build_model
from tests.forks import ROOT

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


def test_wrong_gpt2_has_no_gate_and_fused_attention():
    model = build_model("gpt2")
    with pytest.raises(InputError, match=r"no projection 'gate'; it has down, o, up. .*`modules`"):
        resolve_targets(model, projections=["gate"])
    with pytest.raises(InputError, match=r"c_attn fuses q, k and v: track it whole with `modules"):
        resolve_targets(model, projections=["q"])


def test_wrong_fused_gate_up():
    config = AutoConfig.for_model("phi3", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, vocab_size=64, pad_token_id=0)  # fmt: skip
    with pytest.raises(InputError, match=r"gate_up_proj fuses gate and up"):
        resolve_targets(skeleton(config), projections=["gate"])


def test_wrong_experts_in_one_parameter():
    config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
                                  num_local_experts=4)  # fmt: skip
    with pytest.raises(InputError, match=r"experts in one 3-D parameter"):
        resolve_targets(skeleton(config), projections=["up"])


def test_wrong_model_without_blocks():
    with pytest.raises(InputError, match="no numbered blocks"):
        resolve_targets(nn.Sequential(nn.Linear(2, 2)))
