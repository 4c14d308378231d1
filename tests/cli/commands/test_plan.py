"""edit.py plan as a user runs it."""

import shlex

import pytest
import yaml

from lightning_kfac.cli.train import main as train
from tests.common import edit
from tests.forks import ROOT


@pytest.mark.parametrize("name", ["quickstart", "olmo2_1b", "olmo2_7b", "llama3_8b", "qwen3_8b"])
def test_shipped_configs_can_be_planned_without_a_network(name, capsys):
    edit("plan", train_config=ROOT / "configs" / f"{name}.yaml", devices=2)
    out = " ".join(capsys.readouterr().out.split())
    assert f"train.py fit --config {ROOT}/configs/{name}.yaml --trainer.devices 2 --trainer.strategy ddp" in out
    assert "fits yes" in out and "Computed, not measured" in out


def test_a_plan_says_everything(capsys):
    options = {"blocks": "[57, 58, 59]", "projections": "[gate, up]", "devices": 8, "nodes": 8}
    edit("plan", shape="llama3-70b", tokens=20_000_000, **options)
    out = " ".join(capsys.readouterr().out.split())
    for part in ("70.55 billion parameters, 6 projections, 20,000,000 tokens, on 64 x h100 on 8 nodes", "accumulators",
                 "gathered weights", "fits yes", "1 pass, 77 steps each", "communication in the collection",
                 "eigenbases", "resume states", "host memory of one node 1",
                 "fsdp: weights and factors sharded", "On each node:"):  # fmt: skip
        assert part in out, part
    assert (
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --rdzv-id collect "
        "train.py fit --model.model_name meta-llama/Llama-3.1-70B --data.corpus TEXT --data.max_tokens 20000000 "
        "--collect.blocks '[57, 58, 59]' --collect.projections '[gate, up]' --model.dtype bfloat16 --trainer.devices 8 "
        "--trainer.num_nodes 8 --trainer.strategy fsdp"
    ) in out


def test_what_does_not_fit_says_what_would(capsys):
    edit("plan", shape="llama3-70b", tokens=1000, blocks="[57]", strategy="ddp", devices=8)
    out = capsys.readouterr().out
    assert "does not fit" in out and "with --strategy auto it fits on 4 of these devices" in out
    assert "(only powers of two were tried)" in " ".join(out.split())
    assert "train.py fit" not in out
    edit("plan", shape="llama3-70b", tokens=1000, blocks="[57]", memory_gb=2)
    assert "4,096 of these devices are too few" in capsys.readouterr().out


def test_experts_are_planned_one_by_one(capsys):
    edit("plan", shape="olmoe-7b", tokens=10_000, blocks="[3]")
    out = " ".join(capsys.readouterr().out.split())
    assert "192 projections" in out and "--collect.projections '[expert_gate, expert_up, expert_down]'" in out
    assert "an expert sees 12.5% of the tokens on average: 1,250 of 10,000" in out
    assert "fewer than 2,048 come to is left unedited (edit.expert_min_tokens): take more tokens" in out
    # 64 experts: two G of 1024, a G and an A of 2048, an A of 1024, in 4 panels
    gigabytes = 64 * (3 * 1024**2 + 2 * 2048**2) * 0.625 * 4 / 1e9
    assert f"{gigabytes:.1f} GB" in out


def test_a_mixture_with_dense_blocks_is_planned_whole(capsys):
    edit("plan", shape="olmoe-7b", tokens=10_000_000, blocks="[3]", projections="[q, expert_down]")
    out = " ".join(capsys.readouterr().out.split())
    assert "65 projections" in out and "take more tokens" not in out


def test_the_printed_command_is_one_that_train_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    edit("plan", train_config="configs/quickstart.yaml", tokens=1000, blocks="[2, 3]", projections="[up]")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "train.py fit" in line)
    words = shlex.split(line)[1:]
    assert words[:2] == ["train.py", "fit"]
    with pytest.raises(SystemExit) as stopped:
        train([*words[1:], "--print_config"])
    assert not stopped.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["max_tokens"] == 1000 and config["collect"]["blocks"] == [2, 3]
    assert config["collect"]["projections"] == ["up"] and str(config["trainer"]["devices"]) == "1"
