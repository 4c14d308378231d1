"""What survives, as tables, pages and figures have it."""

from io import BytesIO

import pytest
from rich.console import Console

from lightning_kfac.reporting.attacks import NOTHING, attack_lines, attacks_table, recovery_curves
from lightning_kfac.reporting.figures.recovery import recovery_figure
from lightning_kfac.reporting.sections import attack_results


def row(label, attack, got, recovered, perplexity=80.0):
    return {
        "stage": "attacked",
        "point": f"{label} {attack}",
        "label": label,
        "attack": attack,
        "got": got,
        "recovered": {"strict_acc": recovered},
        "perplexity": perplexity,
        "intervals": {"perplexity": [perplexity * 0.9, perplexity * 1.1]},
    }


def relearned(label, steps, got, lr=0.1):
    attack = {"name": "relearning", "optimizer": "adam", "lr": lr, "steps": steps}
    return row(label, attack, [got, got - 0.05, got + 0.05], [got, 0.0, 2 * got])


PAIR = [
    {
        "stage": "baseline",
        "point": "b",
        "strict_acc": 0.98,
        "perplexity": 70.0,
        "intervals": {"strict_acc": [0.9, 1.0]},
    },
    {"stage": "edited", "point": "e", "strict_acc": 0.04, "perplexity": 75.0, "intervals": {"strict_acc": [0.01, 0.1]}},
]
ROWS = [
    *PAIR,
    row("int4, groups of 128", {"name": "quantization"}, [0.5, 0.4, 0.6], [0.489, 0.3, 0.62], 12345.6),
    row("pruning <b>", {"name": "pruning"}, [0.04, 0.01, 0.1], [0.0, 0.0, 0.0], 3.2e7),
    row("noise", {"name": "noise"}, [0.04, 0.01, 0.1], None),
    row("samples", {"name": "sampling"}, [0.05, 0.01, 0.1], [0.01, None, None]),
    relearned("relearning", 20, 0.3),
    relearned("relearning demo:some_long_name_of_a_file.jsonl", 5, 0.1),
    relearned("relearning", 1, 0.1),
    relearned("relearning", 1, 0.2, lr=0.2),
]


def text_of(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_a_line_says_before_after_attacked_and_recovered():
    lines = {line.label: line.cells for line in attack_lines(ROWS)}
    assert [cell.text for cell in lines["int4, groups of 128"]] == ["0.98", "0.04", "0.50", "49%", "12346"]
    assert [cell.bounds for cell in lines["int4, groups of 128"]] == [
        "0.90-1.00",
        "0.01-0.10",
        "0.40-0.60",
        "30% to 62%",
        "11111-13580",
    ]
    assert lines["pruning <b>"][3] == ("0%", "") and lines["pruning <b>"][4].text == "3e+07"
    assert lines["noise"][3] == (NOTHING, "") and lines["samples"][3] == ("1%", "")
    assert {"relearning, 20 steps", "relearning, 1 step"} <= set(lines)
    near = ROWS[2] | {"recovered": {"strict_acc": [0.5, 0.4, 0.6], "loose_acc": None}}
    assert attack_lines([*PAIR, near])[0].nearly == ((NOTHING, ""), ("", ""))


def test_the_table_is_as_wide_as_a_terminal():
    text = text_of(attacks_table(ROWS))
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert " ".join(text.split()).count("nothing was") == 1 and "pruning <b>" in text


def test_an_attack_that_was_measured_again_stands_once():
    later = ROWS[2] | {"got": [0.7, 0.6, 0.8]}
    lines = attack_lines([*ROWS, later])
    assert len(lines) == len(ROWS) - 2 and lines[0].cells[2].text == "0.70"


def test_curves_are_in_the_order_of_their_steps_and_apart():
    curves = recovery_curves(ROWS)
    assert {label: [row["attack"]["steps"] for row in points] for label, points in curves.items()} == {
        "relearning": [1, 20],
        "relearning demo:some_long_name_of_a_file.jsonl": [5],
        "relearning (2)": [1],
    }
    assert recovery_curves(ROWS[:5]) == {}


def test_figure_draws_every_curve_from_the_edited_model():
    figure = recovery_figure(ROWS, "of $money$")
    share, cost = figure.axes
    drawn = {line[0].get_label(): line[0] for line in share.containers}
    assert len(share.containers) == len(cost.containers) == 3
    first = share.containers[0][0]
    assert first.get_ydata().tolist() == pytest.approx([0.04, 0.1, 0.3]) and len(drawn) >= 1
    assert first.get_xdata()[0] == 0
    figure.savefig(BytesIO(), format="png")


def test_figure_without_held_out_text():
    """Nothing is known of perplexity then, and nothing is drawn of it."""
    rows = [{key: value for key, value in row.items() if key not in ("perplexity", "intervals")} for row in ROWS]
    figure = recovery_figure(rows, "of an edit")
    (share,) = figure.axes
    assert len(share.containers) == 3 and "steps" in share.get_xlabel()
    figure.savefig(BytesIO(), format="png")


def test_page():
    text = attack_results(ROWS)
    assert text.startswith("<h2>What survives attacks</h2>") and "<svg" in text
    assert '0.50 <span class="interval">[0.40-0.60]</span>' in text and NOTHING in text
    assert "pruning &lt;b&gt;" in text and "pruning <b>" not in text
    assert attack_results(PAIR) == attack_results([]) == ""
    assert "<svg" not in attack_results(ROWS[:4])
