"""Runs in odd circumstances: a clock that jumps, another user's folder, packed text, a reader, a kill while loading."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
import zstandard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kfac import load_factors
from lightning_kfac.assets import DEMO
from lightning_kfac.storage.manifest import files_below
from tests.callbacks.collection.common import options, outcome
from tests.forks import Run

YEARS = 1e9
NOBODY = 65534


def contents(folder):
    return {path: path.read_bytes() for path in files_below(folder)}


def test_a_clock_that_is_set_back_changes_no_bit(forks, texts, whole, tmp_path):
    """Neither what is newest nor what is done is told by the time, of files or of the machine."""
    reference, events, _ = whole
    folder = tmp_path / "run"
    args = options(texts, folder)
    how = {"watched": str(folder)}
    assert forks.run(args, tmp_path / "log", **how, kill_at=events // 2)[0] == -9
    for number, path in enumerate(sorted(files_below(folder), reverse=True)):
        os.utime(path, (1000 + number, 1000 + number))
    assert forks.run(args, tmp_path / "log", **how, kill_at=20, clock=-YEARS)[0] == -9
    assert forks.run(args, tmp_path / "log", **how, kill_at=20, clock=YEARS)[0] == -9
    code, said = forks.run(args, tmp_path / "log", clock=-YEARS)
    assert code == 0, said
    assert outcome(folder) == reference


def test_a_packed_corpus_goes_on(forks, texts, whole, tmp_path):
    reference, events, _ = whole
    packed = tmp_path / "corpus.jsonl.zst"
    packed.write_bytes(zstandard.compress((texts / "corpus.jsonl").read_bytes()))
    args = options(texts, tmp_path / "run", **{"data.corpus": packed})
    for kill_at in (12, events // 3, 30):
        assert forks.run(args, tmp_path / "log", watched=str(tmp_path / "run"), kill_at=kill_at)[0] == -9
    code, said = forks.run(args, tmp_path / "log")
    assert code == 0, said
    assert outcome(tmp_path / "run")["files"] == reference["files"]
    packed.write_bytes(packed.read_bytes()[:-5])
    code, said = forks.run([*args, "--overwrite"], tmp_path / "log")
    assert code == 2 and "corpus.jsonl.zst: cut off; bring it here again" in said and "Traceback" not in said, said
    assert outcome(tmp_path / "run")["files"] == reference["files"]


def test_tensorboard_reads_while_the_run_writes(forks, texts, tmp_path):
    folder = tmp_path / "run"
    pid = forks.start(Run(options(texts, folder, **{"trainer.logger": "null"}), str(tmp_path / "log")))
    following = None
    seen = []
    deadline = time.monotonic() + 90
    while not (folder / "edited").exists() and time.monotonic() < deadline:
        if following is None and (folder / "tensorboard").is_dir():
            following = EventAccumulator(str(folder / "tensorboard"))
        if following is not None:
            following.Reload()
            seen.append(len(following.Tags()["scalars"]))
        time.sleep(0.02)
    assert forks.wait(pid) == 0, (tmp_path / "log").read_text()
    following.Reload()
    fresh = EventAccumulator(str(folder / "tensorboard"))
    fresh.Reload()
    assert seen == sorted(seen) and following.Tags() == fresh.Tags()
    assert {"val/baseline/strict_acc", "val/edited/perplexity"} <= set(fresh.Tags()["scalars"])


def test_a_kill_while_the_model_is_read_leaves_it_and_the_next_run_alone(forks, texts, whole, tmp_path):
    model = shutil.copytree(DEMO, tmp_path / "model")
    before = contents(model)
    args = options(texts, tmp_path / "run", **{"model.model_name": model})
    count = tmp_path / "count"
    how = {"watched": str(model), "reads": True}
    code, said = forks.run(
        options(texts, tmp_path / "other", **{"model.model_name": model}), tmp_path / "log", **how, count_to=str(count)
    )
    assert code == 0, said
    for part in (1, 2, 3):
        assert forks.run(args, tmp_path / "log", **how, kill_at=part * int(count.read_text()) // 4)[0] == -9
        assert contents(model) == before
    code, said = forks.run(args, tmp_path / "log")
    assert code == 0, said
    assert outcome(tmp_path / "run")["files"] == whole[0]["files"] and contents(model) == before


def test_an_import_that_is_killed_anywhere(forks, tmp_path):
    """The older factors or the new ones, never a part; the same command then works."""
    source = tmp_path / "factors.pt"
    torch.save(
        {"layer_5.gate_proj": (torch.eye(3), torch.eye(2)), "layer_5.up_proj": (torch.eye(3), torch.eye(2))}, source
    )
    out = tmp_path / "out" / "factors"
    words = ["import", "--source", str(source), "--output", str(out), "--n_tokens", "7"]
    how = {"module": "lightning_kfac", "watched": str(out.parent)}
    assert forks.run(words, tmp_path / "log", **how, count_to=str(tmp_path / "count"))[0] == 0
    events = int((tmp_path / "count").read_text())
    assert events > 8
    words[-1] = "8"
    for kill_at in range(1, events + 1, 3):
        code, said = forks.run([*words, "--overwrite"], tmp_path / "log", **how, kill_at=kill_at)
        assert code == -9, said
        if out.exists():
            factors = load_factors(out)
            assert {factors[name].n_tokens for name in factors} in ({7}, {8}) and len(factors) == 2
    code, said = forks.run([*words, "--overwrite"], tmp_path / "log", **how)
    assert code == 0, said
    assert load_factors(out)["model.layers.5.mlp.up_proj"].n_tokens == 8
    assert [path.name for path in out.parent.iterdir()] == ["factors"]


@pytest.fixture
def open_folder():
    """Where every user may look."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_s_folder(forks, texts, whole, open_folder):
    """It can be read from; nothing is written there, and that is known before the work."""
    reference, events, run = whole
    readable = shutil.copytree(texts, open_folder / "texts")
    interrupted = open_folder / "interrupted"
    args = options(readable, interrupted)
    assert forks.run(args, open_folder / "log", watched=str(interrupted), kill_at=events // 2)[0] == -9
    before = contents(interrupted)
    own = open_folder / "own"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)
    somebody = {"user": NOBODY, "env": {"HOME": str(own)}}
    for folder in (interrupted, open_folder / "new"):
        code, said = forks.run(options(readable, folder), open_folder / "log", **somebody)
        assert code == 2 and "permission denied" in said and "Traceback" not in said, said
        assert "collect:" not in said and said.count("error:") == 1, said
    assert contents(interrupted) == before and not (open_folder / "new").exists()
    factors = shutil.copytree(run / "factors", open_folder / "factors")
    shutil.rmtree(factors / "bases", ignore_errors=True)
    kept = contents(factors)
    words = ["apply", "--factors", str(factors), "--rho", "0.8", "--output", str(own / "edited")]
    code, said = forks.run(words, open_folder / "log", module="lightning_kfac", **somebody)
    assert code == 0 and contents(factors) == kept, said
    assert forks.run(args, open_folder / "log")[0] == 0 and outcome(interrupted)["files"] == reference["files"]


def test_coupled_factors_go_on_bit_for_bit(forks, texts, tmp_path):
    """In two passes, the second of which is interrupted as well."""
    changes = {"collect.coupled": "true", "collect.layers_per_pass": 1, "edit.formula": "coupled"}
    changes |= {"data.memorized": "null", "data.heldout": "null"}
    whole, run = options(texts, tmp_path / "whole", **changes), options(texts, tmp_path / "run", **changes)
    count = tmp_path / "count"
    code, said = forks.run(whole, tmp_path / "log", watched=str(tmp_path / "whole"), count_to=str(count))
    assert code == 0, said
    events = int(count.read_text())
    for kill_at in (events // 3, events // 3):
        assert forks.run(run, tmp_path / "log", watched=str(tmp_path / "run"), kill_at=kill_at)[0] == -9
    code, said = forks.run([*run, "--collect.coupled", "false", "--edit.formula", "original"], tmp_path / "log")
    assert code == 2 and "an unfinished run whose coupled is True" in said, said
    code, said = forks.run(run, tmp_path / "log")
    assert code == 0, said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    factors = load_factors(tmp_path / "run" / "factors")
    assert all(list(factors[name].matrices) == ["G", "A", "G_coupled", "A_coupled"] for name in factors)
