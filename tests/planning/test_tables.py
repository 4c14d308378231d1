"""The tables of docs/scaling.md."""

from benchmarks.scaling import tables
from lightning_kfac.planning.architecture import SHAPES
from tests.forks import ROOT


def test_the_tables_in_the_docs_are_what_the_code_says_now():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert tables() in text, "paste what `python -m benchmarks.scaling` prints into docs/scaling.md"
    assert all(hub in text for hub, _ in (SHAPES[name] for name in ("olmo2-1b", "olmo2-7b", "llama3-70b")))
