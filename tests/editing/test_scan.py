"""The scan of blocks and projections: what it tries, what it recommends, and that the halves stay apart."""

import json
import math

import pytest

from lightning_kfac.cli.edit import main as edit
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.scan import candidates, places, recommended, single_edits, worthwhile
from lightning_kfac.storage.results import read_results

LAYERS = {block: ["gate", "up"] for block in (2, 3, 4, 6)}
BEFORE = {"strict_acc": 1.0, "perplexity": 20.0}


def row(strict, perplexity):
    return {"strict_acc": strict, "perplexity": perplexity}


def test_places_of_layers():
    names = [f"model.layers.{block}.mlp.{projection}_proj" for block in (10, 2) for projection in ("up", "down")]
    assert places([*names, "lm_head"]) == {2: ["up", "down"], 10: ["up", "down"]}


def test_every_block_and_projection_alone():
    edits = [(edit.blocks, edit.projections) for edit in single_edits(LAYERS, EditConfig())]
    expected = [([b], p) for b in LAYERS for p in (["gate", "up"], ["gate"], ["up"])]
    assert edits == expected
    assert len(single_edits({3: ["up"]}, EditConfig())) == 1


def test_worth_is_recitation_taken_over_cost():
    assert worthwhile(BEFORE, row(0.4, 22.0)) == pytest.approx(0.6 / math.log(1.1))
    assert worthwhile(BEFORE, row(0.4, 19.0)) == 0.6 / 1e-3  # cheaper than nothing counts as nothing


def test_candidates_are_windows_of_the_best_blocks():
    rows = {2: row(0.9, 20.1), 3: row(0.1, 20.5), 4: row(0.2, 20.5), 6: row(0.0, 40.0)}
    tried = candidates(rows, BEFORE, LAYERS, EditConfig(), [0.7, 0.8], widest=2)
    windows = list(dict.fromkeys(tuple(edit.blocks) for edit in tried))
    assert windows[:2] == [(3,), (4,)] and (3, 4) in windows
    assert not any(6 in window and len(window) > 1 for window in windows)  # 4 and 6 are no neighbours
    assert {edit.rho for edit in tried} == {0.7, 0.8} and len(tried) == 2 * len(windows)


def test_the_cheapest_that_reaches_the_target():
    assert recommended([row(0.2, 20), row(0.1, 22), row(0.0, 21), row(0.05, 30)], 0.1) == 2
    assert recommended([row(0.2, 20)], 0.1) is None
    assert recommended([row(0.0, None), row(0.0, math.inf), row(0.1, 30)], 0.1) == 2
    assert worthwhile(BEFORE, row(0.0, None)) == -math.inf


def scan(factors, folder, few, **changes):
    options = {
        "factors": factors,
        "output": folder,
        "dtype": "float32",
        "rhos": "[0.6]",
        "data.memorized": few,
        "data.heldout": "embedded",
        "data.heldout_tokens": 400,
        "data.seq_len": 64,
        "accelerator": "cpu",
        **changes,
    }
    edit(["scan", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])


@pytest.fixture
def few(tmp_path):
    from lightning_kfac.assets import DEMO

    lines = (DEMO / "planted_tuning.jsonl").read_text("utf-8").splitlines()[:8]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scan_of_a_block(demo_factors, tmp_path, few, capsys):
    folder = tmp_path / "scan"
    scan(demo_factors, folder, few)
    halves = [(folder / "halves" / name).read_text().splitlines() for name in ("choose.jsonl", "report.jsonl")]
    assert [len(half) for half in halves] == [4, 4] and not set(halves[0]) & set(halves[1])
    rows = read_results(folder / "results.jsonl")
    assert [r["edit"] and r["edit"]["projections"] for r in rows] == [None, ["gate", "up"], ["gate"], ["up"]]
    found = json.loads((folder / "recommended.json").read_text())
    assert (found["blocks"], found["rho"]) == ([3], 0.6)
    assert found["reporting"][1]["n_sequences"] == 4 and found["choosing"]["strict_acc"] <= 0.1
    assert (folder / "scan.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "Recommended: --blocks '[3]' --projections '[gate, up]' --rho 0.6" in " ".join(shown.split())
    # Again: nothing is measured twice.
    scan(demo_factors, folder, few)
    assert read_results(folder / "results.jsonl") == rows
    assert json.loads((folder / "run.json").read_text())["command"].startswith("python edit.py scan --factors")
    edit(["report", str(folder)])
    assert "scan of blocks and projections" in (folder / "report.html").read_text()


def test_scan_without_a_setting_that_reaches_the_target(demo_factors, tmp_path, few, capsys):
    scan(demo_factors, tmp_path / "scan", few, rhos="[1.0]", rho=1.0)
    assert "No setting that was tried reaches strict 0.1; the least is 1.000" in " ".join(
        capsys.readouterr().out.split()
    )


def test_wrong_scans(demo_factors, tmp_path, few, capsys):
    for changes, message in (
        ({"data.heldout": "null"}, "set data.memorized and data.heldout"),
        ({"rho": 1.5}, "rho"),
        ({"rhos": "[]"}, "--rhos must name at least one rho"),
        ({"widest": 0}, "--widest must be at least 1"),
        ({"data.memorized": tmp_path / "wrong" / "halves" / "choose.jsonl"}, "is a half that this scan would write"),
    ):
        with pytest.raises(SystemExit):
            scan(demo_factors, tmp_path / "wrong", few, **changes)
        assert message in " ".join(capsys.readouterr().err.split())
