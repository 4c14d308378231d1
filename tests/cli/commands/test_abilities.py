"""edit.py abilities as a user runs it."""

import json

import pytest

from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.cli.shipped import PLACES
from tests.common import failed
from tests.data.test_ability_tasks import sentences

CONFIGS = PLACES[-1]


@pytest.fixture
def quick(tmp_path):
    """A small corpus, and few questions."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(sentences(40)))
    return {"questions": 8, "memorized": "demo:planted_codes.jsonl", "corpus": tmp_path / "corpus.txt"}


def words(**options):
    return ["abilities", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_a_model_against_itself(quick, demo_factors, tmp_path, capsys):
    """By the shipped config, cut down: everything is kept, and the page shows it."""
    out = tmp_path / "a"
    changes = words(model="demo", unedited="demo", factors=demo_factors, output=out, **quick)[1:]
    edit_main(["abilities", "--config", str(CONFIGS / "abilities.yaml"), *changes])
    found = json.loads((out / "abilities.json").read_text())
    kept = [task["retention"][0] for task in (*found["tasks"], *found["groups"]) if task["retention"]]
    assert kept and set(kept) == {1} and {task["p"] for task in found["tasks"]} == {1}
    assert [group["name"] for group in found["groups"]] == [
        "logic", "open-book", "closed-book", "arithmetic", "recitation"
    ]  # fmt: skip
    assert set(found["low_shares"]) == {task["name"] for task in found["tasks"]}
    assert found["correlation"] is None  # nothing is lost, so there is no order
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == sum(task["n"] for task in found["tasks"])
    assert all(row["unedited"] == row["edited"] for row in rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "What is left of each ability" in said and "- brackets" in said and "not measured" in said
    edit_main(["report", str(out)])
    page = (out / "report.html").read_text()
    assert "<h2>Abilities</h2>" in page and "what is left of each ability" in page
    assert "is already there" in failed(capsys, "abilities", model="demo", unedited="demo", output=out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--model is missing"),
        ({"model": "demo"}, "demo: no unedited model is known; name the unedited model with --unedited"),
        ({"model": "demo", "unedited": "demo", "questions": 3}, "--questions is 3; it must be at least 4"),
        ({"model": "demo", "unedited": "demo", "corpus": "/nowhere.txt"}, "/nowhere.txt"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    assert message in failed(capsys, "abilities", output=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_factors_of_other_weights(quick, demo_factors, tmp_path, capsys):
    error = failed(
        capsys,
        "abilities",
        model="demo-arithmetic",
        unedited="demo-arithmetic",
        factors=demo_factors,
        output=tmp_path / "a",
    )
    assert "collected from other weights than those of the unedited model" in error
