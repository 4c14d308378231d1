"""Examples as a table and as Markdown."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_kfac import EditConfig
from lightning_kfac.console import PlainConsole, fitted
from lightning_kfac.editing.report import EditReport, LayerReport
from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.metrics.described import SequencesSeen
from lightning_kfac.reporting.edit_table import report_table
from lightning_kfac.reporting.sections import _figure
from lightning_kfac.reporting.tables import (
    Example,
    comparison_table,
    examples_markdown,
    examples_table,
    leaks_table,
    show_sweep,
    sweep_table,
)
from lightning_kfac.storage.results import append_result, read_results


def test_text_with_markup_is_shown_as_it_is():
    text = r"a \[/INST] [bold]b re.sub(r'\[a-z]', x) `*c*` <d>"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(examples_table([Example(text, text, text, text)]))
    assert console.export_text().count(text) == 4
    assert r"\[bold\]b" in examples_markdown([Example(text, text, text, text)])


def test_what_diverges_stands_out():
    example = Example("p", "one two", "one two", "one  tw[o]\nelse", "[o]\nelse")
    assert "> one tw**\\[o\\] else**" in examples_markdown([example])
    assert "> one **two**" in examples_markdown([example._replace(after="one two", diverging="two")])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(examples_table([example]))
    assert "one tw[o] else" in console.export_text()


def measured(count: int) -> dict:
    """What ``results.jsonl`` says of so many sequences, each recited but for its last token."""
    evaluation = Evaluation(["memorized"], [], (), None)
    golds = [[1, 2, 3, 4]] * count
    found = [[1, 2, 3, 5]] * count
    for metric in evaluation.sets["memorized"].metrics:
        metric.observe(SequencesSeen(range(count), golds, found, [False] * count, {}, None, golds, [-1.0] * count))
    results = evaluation.results()
    return {**results, "intervals": evaluation.intervals()}


def test_one_sequence_has_no_interval(tmp_path):
    """It says nothing of others: n/a, where two have one. A rate has Wilson's, which is wide."""
    for count in (1, 2):
        append_result(tmp_path / "results.jsonl", measured(count))
    one, two = read_results(tmp_path / "results.jsonl")
    assert one["avg_levenshtein_norm"] == two["avg_levenshtein_norm"] == 0.25
    assert one["intervals"]["avg_levenshtein_norm"] == one["intervals"]["extraction.expected_at.10"] == [None, None]
    assert two["intervals"]["avg_levenshtein_norm"] == [0.25, 0.25]
    assert one["intervals"]["strict_acc"][1] - one["intervals"]["strict_acc"][0] > 0.7
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table({"baseline": one}))
    shown = console.export_text()
    assert "(1 sequence)" in shown and "0.250 [n/a]" in shown and "[0.250" not in shown
    assert "[n/a]" in _figure(one, "avg_levenshtein_norm") and "n/a" not in _figure(two, "avg_levenshtein_norm")


def test_the_table_of_leaks_fits_a_terminal():
    figures = {"leaks.members": 100, "leaks.nonmembers": 100, "leaks.extraction_strength.auc": 0.93}
    row = figures | {"leaks.extraction_strength.tpr_at_fpr_0.01": 0.3}
    row["intervals"] = {"leaks.extraction_strength.auc": [0.88, 0.96]}
    change = {"differences": {"leaks.extraction_strength.auc": [-0.07, -0.12, -0.03]}}
    shown = at_width(leaks_table({"baseline": row, "edited": row | change}), 80)
    assert "100 members, 100 non-members" in shown
    assert shown.count("[0.880, 0.960]") == 2 and "extraction" in shown and "strength" in shown


RECORD = {
    "strict_acc": 0.98, "loose_acc": 1.0, "avg_levenshtein_norm": 0.01, "n_sequences": 100, "perplexity": 70.33,
    "ndcg@10": 0.9387, "extraction.expected_at.1000": 0.998, "quotes/n_sequences": 1, "quotes/strict_acc": 1.0,
    "shift_levenshtein_norm": 0.751, "n_not_recited": 50,
}  # fmt: skip
FIGURES = [name for name in RECORD if "n_" not in name.replace("n_norm", "")]


@pytest.mark.parametrize("width", [80, 120])
def test_before_and_after_fits(width):
    """No interval is broken, no column is lost, and no word of a machine is in it."""
    before = RECORD | {"intervals": {name: [0.9461, 0.9983] for name in RECORD}}
    after = before | {"differences": {name: [-0.9134, -0.9871, -0.8812] for name in RECORD}}
    shown = at_width(comparison_table({"baseline": before, "edited": after}), width)
    assert "unedited" in shown and "baseline" not in shown and "gold" not in shown
    words = " ".join(shown.split())
    assert "how far" in words and "quotes (1 sequence)" in words and "memorized (100 sequences)" in words
    assert len(re.findall(r"\[0\.94\d*, 0\.99\d*\]|\[0\.95, 1\.00\]", shown)) == 2 * len(FIGURES)
    assert len(re.findall(r"\[-0\.\d+, -0\.\d+\]", shown)) == len(FIGURES)
    assert "(continued)" not in shown  # one table, at 80 columns with the intervals below


@pytest.mark.parametrize("width", [80, 120])
def test_sweeps_and_edits_fit(width, capsys, monkeypatch):
    """A split table has the edit and its rho in every part, and every figure once."""
    edit = {
        "formula": "corrected_modified",
        "rho": 0.8,
        "mode": "suppress",
        "alpha": None,
        "layers": None,
        "seed": None,
    }
    edit |= {"fraction_kept": 0.2, "relative_change": 0.5, "projections": ["gate", "up"], "mix": None, "basis": None}
    rows = [RECORD | {"edit": None}, *(RECORD | {"edit": edit | {"blocks": [n, n + 1]}} for n in (11, 12))]
    monkeypatch.setenv("COLUMNS", str(width))
    show_sweep(sweep_table(rows, "All edits", [1]))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    assert shown.count("70.33") == shown.count("0.9387") == 3 and shown.count("0.998") == 3
    assert shown.count("unedited") == shown.count("rho") and "a star where" in " ".join(shown.split())
    did = 1_234_567, 45_000_000, 0.03, 0.8, 123.4, 56.78, 0.9, 0.8, "original"
    layers = [LayerReport(f"model.layers.{n}.mlp.up_proj", *did) for n in (11, 12)]
    shown = at_width(report_table(EditReport(EditConfig(rho=0.8), layers), "What the edit did"), width)
    assert "(formula original, rho 0.8)" in shown and shown.count("45,000,000") == 2 and "(continued)" not in shown
    other = replace(layers[1], rho=0.7, formula="corrected_modified")
    shown = at_width(report_table(EditReport(EditConfig(rho=0.8), [layers[0], other]), "What the edit did"), width)
    assert "corrected_modified" in shown and shown.count("0.900") == 3


def at_width(table, width):
    """What a terminal of this width shows of a table: nothing is cut."""
    target = PlainConsole(width=width, file=io.StringIO())
    for part in fitted(table, width):
        target.print(part)
    shown = target.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    return shown
