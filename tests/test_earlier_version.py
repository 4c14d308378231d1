"""What version 0.1 wrote still works: factors, an edited checkpoint, a patch, a finished run and an interrupted one.

``tests/v0_1`` was made by the last commit before the modules moved. All of it is of one tiny model, with one
thread on an AMD EPYC; figures made here agree to rounding.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_kfac import load_factors
from lightning_kfac.cli.edit import main as edit
from lightning_kfac.cli.train import main as train

MADE = Path(__file__).parent / "v0_1"
COLLECTION = {
    "model.model_name": "model",
    "model.dtype": "float32",
    "data.corpus": "corpus.jsonl",
    "data.max_tokens": "700",
    "data.seq_len": "32",
    "data.batch_size": "2",
    "data.heldout": "corpus.jsonl",
    "data.heldout_tokens": "300",
    "data.memorized": "memorized.jsonl",
    "collect.blocks": "[1]",
    "collect.projections": "[gate,up]",
    "collect.save_minutes": "0",
    "edit.rho": "0.8",
    "trainer.logger": "false",
    "trainer.accelerator": "cpu",
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A copy of the folder, as it was: the run's state knows size and time of its corpus."""
    shutil.copytree(MADE, tmp_path / "made")
    # The edited model has the same; it is kept once.
    shutil.copy(MADE / "model" / "tokenizer.json", tmp_path / "made" / "finished" / "edited")
    os.utime(tmp_path / "made" / "corpus.jsonl", (1_700_000_000, 1_700_000_000))
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def fit(folder: str) -> list[str]:
    """The command that made the runs."""
    options = COLLECTION | {"trainer.default_root_dir": folder}
    return ["fit", *[word for name, value in options.items() for word in (f"--{name}", value)]]


def same_weights(ours: Path, theirs: Path, tolerance: float = 1e-6) -> None:
    """Both files hold the same tensors, to rounding."""
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance * max(1.0, tensor.abs().max().item()))


def test_factors_edit_as_they_did(made):
    factors = load_factors("finished/factors")
    assert {name: (f.shape, f.n_tokens) for name, f in factors.items()} == {
        "model.layers.1.mlp.gate_proj": ((24, 16), 678),
        "model.layers.1.mlp.up_proj": ((24, 16), 678),
    }
    edit(["apply", "--factors", "finished/factors", "--model", "model", "--rho", "0.8", "--dtype", "float32",
          "--output", "again"])  # fmt: skip
    same_weights(made / "again/model.safetensors", made / "finished/edited/model.safetensors")


def test_an_interrupted_run_goes_on(made, capsys):
    train(fit("interrupted"))
    assert "going on after batch 5" in capsys.readouterr().err
    ours, theirs = load_factors("interrupted/factors"), load_factors("finished/factors")
    for name, layer in theirs.items():
        torch.testing.assert_close(ours[name].A, layer.A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[name].G, layer.G, rtol=1e-5, atol=1e-6)
    same_weights(made / "interrupted/edited/model.safetensors", made / "finished/edited/model.safetensors", 1e-5)
    rows = [json.loads(line) for line in Path("interrupted/results.jsonl").read_text().splitlines()]
    known = [json.loads(line) for line in Path("finished/results.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["baseline", "edited"]
    for row, before in zip(rows, known, strict=True):
        assert row.keys() >= before.keys()
        assert row["perplexity"] == pytest.approx(before["perplexity"], rel=1e-5)
        assert row["strict_acc"] == before["strict_acc"]


def test_a_finished_run_is_known(made, capsys):
    with pytest.raises(SystemExit) as stop:
        train(fit("finished"))
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    edit(["report", "finished"])
    assert "strict accuracy" in Path("finished/report.html").read_text()


def test_patches_and_edited_models_are_read(made):
    edit(["apply", "--model", "model", "--patch", "patch", "--output", "patched"])
    edit(["restore", "--model", "finished/edited", "--output", "restored"])
    before = load_file("model/model.safetensors")
    restored = load_file("restored/model.safetensors")
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(restored[name].float(), before[name].float())
        patched = load_file("patched/model.safetensors")[name]
        assert not torch.equal(patched.float(), before[name].float())
    data = ["--data.memorized", "memorized.jsonl", "--data.heldout", "corpus.jsonl", "--data.heldout_tokens", "300"]
    where = ["--data.seq_len", "32", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    train(
        ["validate", "--model.model_name", "finished/edited", *data, *where, "--trainer.default_root_dir", "measured"]
    )
    rows = [json.loads(line) for line in Path("measured/results.jsonl").read_text().splitlines()]
    known = [json.loads(line) for line in Path("finished/results.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["baseline", "edited"]
    assert rows[1]["perplexity"] == pytest.approx(known[1]["perplexity"], rel=1e-5)
