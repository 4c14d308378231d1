"""benchmarks.real_model: its whole path on the embedded demo model, its texts, and the result that is committed."""

import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.real_model import RECITED, RESULT, SMALL, RealModel, Sizes, planted_share
from benchmarks.real_page import ability_lines, attack_lines, comparison_lines, scan_lines, time_lines
from benchmarks.real_texts import SHARED_WORDS, shingles
from benchmarks.steps import GRID, TARGET, weakest
from lightning_kfac.cli.shipped import find_config
from lightning_kfac.editing.formulas import FORMULAS

TINY = replace(
    SMALL,
    passages=1,
    rounds=3,
    a_round=3,
    plant={
        "model.training.lr": 3e-3,
        "data.exposures": 24,
        "data.batch_size": 4,
        "data.max_tokens": 600,
        "data.heldout_tokens": 300,
    },
    scanned=(3, 4),
    scan_tokens=600,
    curvature_tokens=800,
    heldout_tokens=400,
    relearning=(1,),
    questions=4,
    formulas=("original", "random"),
)


def jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return folder, RealModel(folder, TINY, small=True).run()


def test_the_whole_path_on_the_demo_model(run):
    steps = run[1]
    assert set(steps["before"]["recited"].values()) == {0}
    assert planted_share(steps["plant"]["course"][-1]) >= RECITED
    assert len(steps["scan"]["edits"]) >= 3 and set(steps["scan"]["blocks"]) <= {3, 4}
    assert set(steps["thresholds"]["rhos"]) == {"original", "random"}
    compared = {row["edit"]["formula"]: row for row in steps["compare"]["edits"]}
    for name, row in compared.items():
        assert row["edit"]["rho"] == steps["thresholds"]["rhos"][name]
        assert row["figures"]["strict_acc"] <= TARGET < steps["compare"]["baseline"]["figures"]["strict_acc"]
    assert steps["edit"]["recited"]["tuning"] == compared["original"]["figures"]["strict_acc"]
    assert [row["stage"] for row in steps["attack"]["rows"]] == ["baseline", "edited", "attacked", "attacked"]


def test_what_is_done_is_not_done_again(run):
    folder, steps = run
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert RealModel(folder, TINY, small=True).run() == steps
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == files


def test_no_other_text_holds_words_of_a_passage(run):
    texts = run[0] / "texts"
    rows = {name: jsonl(texts / f"{name}.jsonl") for name in ("tuning", "report", "unseen")}
    passages = [row for some in rows.values() for row in some]
    assert len({row["document"] for row in passages}) == len(passages) == 6
    assert {(len(row["prefix_ids"]), len(row["suffix_ids"])) for row in passages} == {(64, 48)}
    assert all(sorted(row["source"] for row in some) == ["docstrings", "topics"] for some in rows.values())
    others = [row for path in sorted(texts.glob("*.jsonl")) for row in jsonl(path) if "text" in row]
    of_text = {path.stem: {row["document"] for row in jsonl(path)} for path in texts.glob("*.jsonl")}
    parts = [of_text[name] for name in ("heldout", "curvature", "general_0", "general_1", "general_2")]
    assert sum(map(len, parts)) == len(set().union(*parts)) > 20
    words = set().union(*(shingles(row["prefix"] + row["suffix"]) for row in passages))
    assert len(words) > 6 * SHARED_WORDS
    assert not any(words & shingles(row["text"]) for row in others)


@pytest.mark.parametrize("threshold", [0.0, 0.11, 0.5, 0.98, 0.996, 1.0])
def test_the_weakest_edit_by_trying_all(threshold):
    tried = []

    def reaches(rho):
        tried.append(rho)
        return rho <= threshold

    assert weakest(reaches) == max((rho for rho in GRID if rho <= threshold), default=None)
    assert len(tried) == len(set(tried)) <= math.ceil(math.log2(len(GRID) + 1))


# -- the result that is committed: consistent, whatever its values -------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text("utf-8"))


def test_the_result_is_of_the_shipped_config(result):
    for name, digest in result["configs"].items():
        assert hashlib.sha256(Path(find_config(name)).read_bytes()).hexdigest() == digest, f"{name}: measure again"
    assert result["sizes"] == json.loads(json.dumps(asdict(Sizes())))
    assert result["steps"]["plain"]["parameters"] > 134e6


def test_counts_of_the_result(result):
    steps = result["steps"]
    counts = steps["texts"]["counts"]
    assert counts["tuning"] == counts["report"] == len(steps["texts"]["sources"]) * result["sizes"]["passages"]
    assert counts["tuning"] + counts["report"] >= 60
    assert len(steps["plant"]["course"]) == steps["plant"]["rounds"]
    assert planted_share(steps["plant"]["course"][-1]) >= RECITED
    assert set(steps["thresholds"]["rhos"]) == set(FORMULAS) == set(result["sizes"]["formulas"])
    reached = {name: rho for name, rho in steps["thresholds"]["rhos"].items() if rho is not None}
    assert {row["edit"]["formula"]: row["edit"]["rho"] for row in steps["compare"]["edits"]} == reached
    for row in steps["compare"]["edits"]:
        assert row["edit"]["blocks"] == steps["collect"]["blocks"]
        for name, share in row["figures"].items():
            if name.endswith("strict_acc") and share is not None:
                n = counts["tuning"] if name == "strict_acc" else result["sizes"]["passages"]
                assert share * n == pytest.approx(round(share * n)), name
    assert len(steps["attack"]["rows"]) == 2 + 1 + len(result["sizes"]["relearning"])
    assert all(step["wall_s"] >= 0 and step["cpu_s"] >= 0 for step in steps.values())


def test_the_page_shows_the_result(result):
    page = (Path(__file__).parents[1] / "docs" / "real_model.md").read_text("utf-8")
    steps = result["steps"]
    tables = (scan_lines, comparison_lines, attack_lines, ability_lines, time_lines)
    lines = [line for table in tables for line in table(steps)]
    assert len(lines) > 40
    assert [line for line in lines if line not in page.splitlines()] == []
    assert f"{steps['plant']['rounds']} rounds" in page


def test_intervals_of_the_result_hold_their_figures(result):
    steps = result["steps"]
    rows = [steps["compare"]["baseline"], *steps["compare"]["edits"], *steps["scan"]["edits"], *steps["attack"]["rows"]]
    intervals = [(row["figures"][name], *ends) for row in rows for name, ends in row["intervals"].items()]
    assert len(intervals) > 100
    assert all(low <= value <= high for value, low, high in intervals if value is not None and low is not None)
    changes = [ends for row in rows for ends in row["differences"].values()]
    assert changes and all(low <= change <= high for change, low, high in changes)
