"""What a plan is asked for: a config, options, or both."""

import pytest
import yaml

from tests.common import edit, failed
from tests.forks import ROOT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("collect: {layers_per_pass: 3}", "6 passes"),
        ("collect: {max_memory_gb: 0.01}", "does not fit"),
        ("data: {max_tokens: 9}\nmodel: {model_name: demo, mc_samples: 2}", "not in this plan: model.mc_samples"),
        ("collect: {moments: token, shard_factors: true}", "not in this plan: collect.moments, collect.shard_factors"),
        ("data: {max_tokens: 9, domains: {other: embedded}}", "not in this plan: data.domains"),
        ("collect: {moments: null, shard_factors: false}\nmodel: {model_name: demo, mc_samples: 1}", "fits yes"),
    ],
)
def test_settings_of_a_config_are_planned_or_named(text, said, tmp_path, capsys):
    sections = {"model": {"model_name": "demo"}, "data": {"max_tokens": 9}} | yaml.safe_load(text)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sections))
    edit("plan", train_config=tmp_path / "a.yaml", hardware="cpu")
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert ("not in this plan" in out) == ("not in this plan" in said)


@pytest.mark.parametrize("dtype", [None, "auto", "float32"])
@pytest.mark.parametrize("name", ["shape", "model", "config"])
def test_a_dtype_that_was_assumed_is_in_the_command(name, dtype, tmp_path, capsys):
    """Nothing asks the checkpoint of a published name, so train.py has to be told what the plan counts with."""
    hub, options = "allenai/OLMo-2-0425-1B", {"tokens": 1000} | ({"dtype": dtype} if dtype else {})
    (tmp_path / "a.yaml").write_text(f"model: {{model_name: {hub}, dtype: auto}}")
    edit("plan", **options, **{"shape": {"shape": "olmo2-1b"}, "model": {"model": hub},
                               "config": {"train_config": tmp_path / "a.yaml"}}[name])  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    said = "float32" if dtype == "float32" else "bfloat16"
    assert out.count("--model.dtype") == 1 and f"--model.dtype {said}" in out
    assert f"weights {5.94 if said == 'float32' else 2.97:.1f} GB" in out


def test_options_override_the_config_and_the_hardware(capsys):
    edit("plan", train_config=ROOT / "configs" / "quickstart.yaml", tokens=1000, dtype="bfloat16", hardware="cpu",
         memory_gb=1, efficiency=1, peak_tflops=1, link_gb=1, network_gb=1)  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "1,000 tokens" in out and "weights 3.7 MB" in out
    assert "--data.max_tokens 1000 --model.dtype bfloat16 --trainer.devices 1 --trainer.accelerator cpu" in out


def test_wrong_plans_are_one_line(tmp_path, capsys):
    good = {"shape": "olmo2-1b", "tokens": 1000}
    for changes, said in (
        ({"shape": "olmo3"}, "choose from olmo2-1b"),
        ({"model": "demo"}, "one of --train_config, --model or --shape"),
        ({"hardware": "abacus"}, "choose from a100"),
        ({"tokens": 0}, "--tokens must be"),
        ({"seq_len": -1}, "--seq_len must be"),
        ({"devices": 0}, "--devices is 0"),
        ({"nodes": -2}, "--nodes is -2"),
        ({"strategy": "fsdp"}, "needs several devices"),
        ({"strategy": "tp"}, "strategy"),
        ({"efficiency": 1.5}, "--efficiency is 1.5"),
        ({"memory_gb": 0}, "--memory_gb is 0"),
        ({"peak_tflops": ".nan"}, "--peak_tflops is nan"),
        ({"blocks": "[99]"}, "block 99 does not exist"),
        ({"projections": "[gat]"}, "unknown projection 'gat'"),
        ({"modules": "[lm_head]"}, "leave it out of --modules"),
        ({"shape": "mixtral-8x7b", "projections": "[gate]"}, "choose `expert_gate`"),
    ):
        assert said in failed(capsys, "plan", **good | changes), changes
    assert "say which model" in failed(capsys, "plan", tokens=1)
    assert "--tokens must be" in failed(capsys, "plan", shape="olmo2-1b")
    assert "no such folder" in failed(capsys, "plan", model="./nowhere", tokens=1)
    for text, said in (
        ("model: [", "not valid YAML"),
        ("data: {}", "no section `model`"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncrystallize: {}", "plan is for collections"),
        ("model: {model_name: demo, training: {lr: 1}}\ndata: {max_tokens: 5}", "plan is for collections"),
        ("model: {model_name: demo, dtype: int8}\ndata: {max_tokens: 5}", "model.dtype is 'int8'"),
        ("model: {model_name: 3}\ndata: {max_tokens: 5}", "model_name must be a text"),
        ("model: {architecture: {model_type: nonsense}}\ndata: {max_tokens: 5}", "architecture"),
        ("model: {architecture: {model_type: olmo2, hidden_size: many}}\ndata: {max_tokens: 5}", "hidden_size"),
        ("model: {architecture: {model_type: olmo2, hidden_size: -4}}\ndata: {max_tokens: 5}", "no causal language"),
        ("model: {architecture: {model_type: t5}}\ndata: {max_tokens: 5}", "no causal language"),
        ("model: {architecture: {model_type: mamba}}\ndata: {max_tokens: 5}", "not a decoder of blocks"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {blocks: {a: 1}}", "--blocks must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {projections: {up: 1}}", "--projections must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: many}", "--tokens must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {max_memory_gb: -1}", "max_memory_gb is -1"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {layers_per_pass: 0}", "must be at least 1"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {layers_per_pass: x}", "a whole number"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert said in failed(capsys, "plan", train_config=path), text
    assert "cannot be read" in failed(capsys, "plan", train_config=tmp_path)
    deep = tmp_path / "deep.txt"
    deep.write_text("[" * 100_000)
    assert "nested too deeply" in failed(capsys, "plan", train_config=deep)
