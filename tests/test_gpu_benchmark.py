"""benchmarks.gpu at small size on the CPU, and the figures of the GPU that are committed."""

import json
import sys

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.page import RESULTS, tables
from benchmarks.gpu.parts import Part
from tests.forks import ROOT


@pytest.mark.timeout(300)
def test_every_part_at_small_size(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # train.py
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--device", "cpu", "--output", str(tmp_path)])
    gpu.main()
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.PARTS}
    steps = {
        f"{part}/{name}": step for part, all_ in found.items() for name, step in all_.items() if isinstance(step, dict)
    }
    assert not [name for name, step in steps.items() if "failed" in step]
    assert not [name for name, step in steps.items() if not step.get("right", True)]
    judged = [name for name, step in steps.items() if "right" in step]
    assert len(judged) >= 9 and "ranks/in one process" in judged
    assert found["collection"]["all blocks: ours"]["sampled"]["tokens_per_second"] > 0


def test_a_step_that_failed_is_told_and_done_again(tmp_path):
    part = Part("some", tmp_path, "cpu", True, budget=60)
    assert part.step("bad", lambda: {}["nothing"]) is None
    assert part.step("good", lambda: {"value": 1}) == {"value": 1}
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["bad"] == {"failed": "KeyError: 'nothing'"} and written["good"] == {"value": 1}
    again = Part("some", tmp_path, "cpu", True, budget=60)
    assert again.step("bad", lambda: {"value": 2}) == {"value": 2}
    assert again.step("good", lambda: {"value": 3}) == {"value": 1}
    late = Part("late", tmp_path, "cpu", True, budget=-1)
    assert late.step("any", lambda: {"value": 1}) is None and "left_out" in late.found["any"]


def test_the_page_holds_what_was_measured():
    text = (ROOT / "docs" / "gpu.md").read_text()
    for table in tables().split("\n\n"):
        assert table in text, "paste what `python -m benchmarks.gpu.page` prints into docs/gpu.md"


def test_committed_figures_agree():
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert set(found) == set(gpu.PARTS)
    assert {one["machine"]["gpu"] for one in found.values()} == {"NVIDIA H200"}
    assert not [
        name for name, step in found["correctness"].items() if isinstance(step, dict) and not step.get("right", True)
    ]
    for name in ("three blocks: ours", "all blocks: ours", "all blocks: on 80 GB"):
        step = found["collection"][name]
        assert step["peak_gb"] <= step["planned_gb"] and step["passes"] == 1
        flops = sum(step["flops_per_token"].values())
        for labels in ("gold", "sampled"):
            rate = step[labels]["tokens_per_second"]
            assert step[labels]["of_the_limit"] == pytest.approx(
                flops * rate / found["collection"]["limit"]["bfloat16"]
            )
            assert rate * step[labels]["seconds_a_batch"] == pytest.approx(32 * 511)
