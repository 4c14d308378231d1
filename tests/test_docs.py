"""The README's Python runs, and everything public has an example (which pytest runs as a doctest)."""

import re
from pathlib import Path

import pytest

import lightning_kfac
from lightning_kfac import attention, metrics
from lightning_kfac.callbacks import CrystallizationStudy, CurvatureCollector, EditCallback, ResidualCollector
from tests import tally

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("place", [lightning_kfac, attention, metrics])
def test_everything_public_has_an_example(place):
    assert [name for name in place.__all__ if ">>>" not in (getattr(place, name).__doc__ or "")] == []


def test_callbacks_have_an_example():
    shown = (CurvatureCollector, EditCallback, ResidualCollector, CrystallizationStudy)
    assert all(">>>" in callback.__doc__ for callback in shown)


def test_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"kept \d+\.\d% of the components", capsys.readouterr().out)
    assert (tmp_path / "runs" / "notebook" / "factors" / "metadata.json").exists()


def test_readme_names_files_that_exist():
    named = set(re.findall(r"`(configs/\w+\.yaml)`", (ROOT / "README.md").read_text()))
    assert named and all((ROOT / name).is_file() for name in named)


def test_promises_are_held_by_tests_that_exist():
    page = (ROOT / "docs" / "trust.md").read_text()
    files = {path for path in re.findall(r"`(tests/[\w/]+\.py)", page)}
    assert len(files) > 20 and [path for path in files if not (ROOT / path).is_file()] == []
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"(?:`|::)(test_\w+)`", page))
    assert len(named) > 40 and named - written == set()


def test_the_counts_of_the_tests_are_written():
    counts = (ROOT / "docs" / "trust.md").read_text().partition(tally.BEGIN)[2]
    for kind in (tally.KILLED, tally.DAMAGED, tally.MUTATED, *tally.CASES):
        assert re.search(rf"^\| {re.escape(kind)} \|.* [1-9][\d,]* \|$", counts, re.M), f"{kind}: run `make trust`"
    assert all((ROOT / "tests" / file).is_file() for files in tally.CASES.values() for file in files)
