"""Examples as a table and as Markdown."""

import io

from rich.console import Console

from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.metrics.described import SequencesSeen
from lightning_kfac.reporting.sections import _figure
from lightning_kfac.reporting.tables import Example, comparison_table, examples_markdown, examples_table, leaks_table
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
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(leaks_table({"baseline": row, "edited": row | change}))
    shown = console.export_text()
    assert "100 members, 100 non-members" in shown and max(map(len, shown.splitlines())) <= 80
    assert shown.count("[0.880,") == 2 and "…" not in shown and "extraction" in shown and "strength" in shown
