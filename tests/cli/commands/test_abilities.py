"""edit.py abilities as a user runs it."""

import json

import pytest

from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.cli.shipped import PLACES
from tests.common import failed
from tests.data.test_ability_tasks import sentences
from tests.evaluation.test_harness import log, sample

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


def test_logs_alone_need_no_model(tmp_path, capsys):
    log(tmp_path / "before", "boolq", [sample(n, 1.0) for n in range(9)])
    log(tmp_path / "after", "boolq", [sample(n, float(n < 3)) for n in range(8)])
    log(tmp_path / "after", "squad", [sample(0, 1.0)])
    logs = {"logs.unedited": tmp_path / "before", "logs.edited": tmp_path / "after"}
    edit_main(words(**logs, output=tmp_path / "a", **{"groups.boolq": "mine"}))
    found = json.loads((tmp_path / "a" / "abilities.json").read_text())
    (task,) = found["tasks"]
    assert (task["n"], task["lost"], task["group"], task["retention"][0]) == (8, 5, "mine", 3 / 8)
    assert found["logs"] == {name.removeprefix("logs."): str(folder) for name, folder in logs.items()}
    said = capsys.readouterr()
    assert "boolq: 8 documents that both models answered, of 9 and 8" in said.err
    assert "left out: squad" in said.err and "38%" in said.out


def test_logs_beside_the_built_in_tasks(quick, demo_factors, tmp_path):
    """Their prompts have shares of low bands too."""
    for which in ("before", "after"):
        log(tmp_path / which, "boolq", [sample(n, 1.0) for n in range(3)])
    logs = {"logs.unedited": tmp_path / "before", "logs.edited": tmp_path / "after", "factors": demo_factors}
    quick |= {"questions": 0, "output": tmp_path / "a"}
    edit_main(words(model="demo", unedited="demo", **logs, **quick))
    found = json.loads((tmp_path / "a" / "abilities.json").read_text())
    assert [task["name"] for task in found["tasks"]] == ["boolq", "recitation"]
    assert set(found["low_shares"]) == {"boolq", "recitation"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--model is missing"),
        ({"logs.edited": "x"}, "--logs.unedited and --logs.edited belong together"),
        ({"logs.edited": "/x", "logs.unedited": "/y"}, "/y: no such folder"),
        ({"logs.edited": "x", "logs.unedited": "x", "factors": "f"}, "--factors needs a --model"),
        ({"model": "demo", "questions": 0}, "--questions 0 leaves nothing to ask"),
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
