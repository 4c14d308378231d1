"""The README's Python runs, links of all pages lead somewhere, and everything public has an example (a doctest)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_kfac
from lightning_kfac import attention, metrics
from lightning_kfac.callbacks import CrystallizationStudy, CurvatureCollector, EditCallback, ResidualCollector
from tests import tally, written_pages

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)


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
    out = capsys.readouterr().out
    kept, before, after = re.search(r"kept (\d+\.\d)% .* recited (\d+)% before, (\d+)% after", out).groups()
    assert float(kept) < 50 and int(before) > 95 and int(after) < 30
    assert (tmp_path / "runs" / "notebook" / "factors" / "metadata.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_configs_that_exist(page):
    named = set(re.findall(r"`(configs/\w+\.yaml)`", page.read_text("utf-8")))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 165 and "`configs/olmo2_7b.yaml`" in text
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", text))
    assert {page.name for page in DOCS} == linked


def anchors(page):
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target))):
            lost.append(link)
    assert lost == []


def test_the_site_shows_every_page():
    listed = set(re.findall(r": ([\w]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.name for page in DOCS} | {"overview.md", "contributing.md", "benchmarks.md"}


@pytest.mark.parametrize("page", written_pages.PAGES)
def test_pages_say_what_the_code_says(page):
    assert (ROOT / "docs" / page).read_text("utf-8") == written_pages.written(page), "run `make docs`"


def test_the_architecture_page_has_every_room():
    plan = set(re.findall(r"\blightning_kfac\.(\w+)", (ROOT / "pyproject.toml").read_text().partition("layers = [")[2]))
    rooms = {name for name in plan if (ROOT / "lightning_kfac" / name).exists() or name in ("errors", "console")}
    table = (ROOT / "docs" / "architecture.md").read_text().partition("\n## ")[0]
    assert len(rooms) > 15 and rooms <= set(re.findall(r"`(\w+)`", table))


def test_the_api_page_has_everything_public():
    shown = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    public = {f"{place.__name__}.{name}" for place in (lightning_kfac, attention, metrics) for name in place.__all__}
    assert shown == public


def test_the_site_builds(tmp_path):
    """Needs the extra ``docs``."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    words = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collect_factors" in (tmp_path / "site" / "api.html").read_text("utf-8")


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
