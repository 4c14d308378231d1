"""benchmarks.sizes: the recipe at a size that takes seconds, and the result that is committed."""

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks import sizes
from benchmarks.steps import GRID, TARGET
from lightning_kfac.cli.shipped import find_config

FEW = {
    "data.max_tokens": 1000,
    "data.heldout_tokens": 400,
    "data.exposures": 1,
    "data.planted": ["demo:planted_report.jsonl"],
    "data.memorized": None,
    "data.sets": None,
    "trainer.precision": "32-true",
}


def test_a_size_of_the_family(tmp_path, monkeypatch):
    """Hardly trained, so that it recites nothing and the weakest edit of all is enough."""
    monkeypatch.setattr(sizes, "FORMULAS", ("original",))
    found = sizes.measure(tmp_path, 32, FEW)
    embedding = 2048 * 32
    assert embedding < found["train"]["parameters"] < embedding + 6 * (4 * 32**2 + 3 * 32 * 128) + 40 * 32
    assert found["train"]["recited"] == dict.fromkeys(sizes.SETS, 0.0)
    assert found["suppress"]["rhos"] == {"original": GRID[-1]}
    (edit,) = found["suppress"]["edits"]
    assert edit["edit"]["blocks"] == [3, 4] and edit["edit"]["projections"] == ["gate", "up"]
    assert {"strict_acc", "report/strict_acc", "perplexity"} <= set(edit["figures"])
    assert sizes.measure(tmp_path, 32, FEW) == found


@pytest.fixture(scope="module")
def result():
    return json.loads(sizes.RESULT.read_text("utf-8"))


def test_the_result_is_of_the_shipped_configs(result):
    for name, digest in result["configs"].items():
        assert hashlib.sha256(Path(find_config(name)).read_bytes()).hexdigest() == digest, f"{name}: measure again"
    assert [int(width) for width in result["sizes"]] == list(sizes.WIDTHS[:3])
    counts = [found["train"]["parameters"] for found in result["sizes"].values()]
    assert counts == sorted(counts) and 1.5e6 < counts[0] < 2.1e6


def test_figures_of_the_result_agree(result):
    for found in result["sizes"].values():
        suppress = found["suppress"]
        reached = {name: rho for name, rho in suppress["rhos"].items() if rho is not None}
        assert set(suppress["rhos"]) == set(sizes.FORMULAS)
        assert {row["edit"]["formula"]: row["edit"]["rho"] for row in suppress["edits"]} == reached
        for row in [suppress["baseline"], *suppress["edits"]]:
            ends = {name: row["intervals"][name] for name in row["intervals"]}
            assert all(low <= row["figures"][name] <= high for name, (low, high) in ends.items() if low is not None)
        assert all(row["figures"]["strict_acc"] <= TARGET for row in suppress["edits"])
        assert all((suppress["least"][name] <= TARGET) == (rho is not None) for name, rho in suppress["rhos"].items())
