"""The scan of blocks and projections as a user runs it, and that the halves stay apart."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_kfac.assets import DEMO
from lightning_kfac.cli.commands.scan import _halves
from lightning_kfac.cli.edit import main as edit
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.set_formats import MemorizedSet
from lightning_kfac.storage.results import read_results


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
    """Eight planted sequences of the tuning set."""
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
    advised, expected = shown.rpartition("Recommended:\n")[2].splitlines()[:2]
    assert advised.split("apply ")[1].startswith(f"--factors {demo_factors} --blocks '[3]' --projections '[gate, up]'")
    assert "it should recite about" in expected and "(unedited: 75); perplexity" in expected
    # Again: nothing is measured twice.
    scan(demo_factors, folder, few)
    assert read_results(folder / "results.jsonl") == rows
    assert json.loads((folder / "run.json").read_text())["command"].startswith("python edit.py scan --factors")
    edit(["report", str(folder)])
    assert "scan of blocks and projections" in (folder / "report.html").read_text()


def test_halves_of_other_files(tmp_path):
    rows = [{"index": n, "tokens": [n, n + 1, n + 2]} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    memorized = MemorizedSet(str(tmp_path / "set.parquet"), tokens_field="tokens")
    halves = [MemorizedSet.parse("memorized", half) for half in _halves(memorized, tmp_path)]
    found = [load_memorized(half, None, 50, prefix_len=2) for half in halves]
    assert [[s.prefix[0] for s in half] for half in found] == [[0, 2, 4], [1, 3]]


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
