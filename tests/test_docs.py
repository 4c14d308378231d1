"""The README's Python runs, and everything public has an example (which pytest runs as a doctest)."""

import re
from pathlib import Path

import pytest

import lightning_kfac
from lightning_kfac import attention, metrics
from lightning_kfac.callbacks import CrystallizationStudy, CurvatureCollector, EditCallback, ResidualCollector

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
