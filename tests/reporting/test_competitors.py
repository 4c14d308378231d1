"""Methods at matched forgetting: what is chosen, and the cells of the tables."""

import pytest

from lightning_kfac.reporting.competitors import (
    chosen,
    comparison_lines,
    comparison_table,
    header,
    method_rows,
    most_recovered,
    needs_lines,
    weakest,
)


def row(label, amount, own, perplexity, falling=False, **more):
    method = {"label": label, "strength": "rho" if falling else "share", "amount": amount, "falling": falling}
    return {
        "point": f"{label} {amount}",
        "stage": "edited",
        "method": method | {"needs": "curvature", "seconds": 3.2},
        "edit": {"relative_change": 0.5},
        "choosing/strict_acc": own,
        "strict_acc": own + 0.1,
        "codes/strict_acc": 0.9,
        "perplexity": perplexity,
        "intervals": {"strict_acc": [0.0, 0.2], "choosing/strict_acc": [0.0, 0.9], "perplexity": [None, None]},
    } | more


BASE = {"point": "base", "stage": "baseline", "edit": None, "choosing/strict_acc": 1.0, "strict_acc": 1.0,
        "codes/strict_acc": 0.95, "perplexity": 70.0}  # fmt: skip
ROWS = [
    BASE,
    row("K-FAC", 0.9, 0.3, 71.0, falling=True),
    row("K-FAC", 0.7, 0.1, 73.0, falling=True),
    row("K-FAC", 0.5, 0.0, 75.0, falling=True),
    row("deletion", 0.9, 0.05, 72.0),
    row("deletion", 0.8, 0.08, 72.5),
    row("noise", 0.9, 0.8, 71.0),
    row("noise", 1.0, 0.4, None),
]


@pytest.mark.parametrize(
    ("target", "expected"), [(0.1, [0.7, 0.8, None]), (0.5, [0.9, 0.8, 1.0]), (0.0, [0.5] + [None] * 2)]
)
def test_the_weakest_that_gets_there_is_chosen(target, expected):
    found = [weakest(rows, "choosing/strict_acc", target) for rows in method_rows(ROWS).values()]
    assert [row and row["method"]["amount"] for row in found] == expected


def test_lines_stand_by_perplexity_and_those_that_never_get_there_last():
    found = chosen(ROWS, 0.1)
    assert [(one.label, one.row["method"]["amount"], one.reached) for one in found] == [
        ("deletion", 0.8, True), ("K-FAC", 0.7, True), ("noise", 1.0, False),
    ]  # fmt: skip
    lines = comparison_lines(ROWS, 0.1)
    assert header(ROWS) == ["its half", "other half", "codes", "perplexity", "change"]
    assert [label for label, _ in lines] == [
        "unedited", "deletion, share 0.8", "K-FAC, rho 0.7", "noise, share 1 (not reached)",
    ]  # fmt: skip
    assert [cell.text for cell in lines[0][1]] == ["1.00", "1.00", "0.95", "70.0", ""]
    assert [tuple(cell) for cell in lines[1][1][:3]] == [("0.08", ""), ("0.18", "0.00-0.20"), ("0.90", "")]
    assert [cell.text for cell in lines[3][1][3:]] == ["n/a", "0.50"]


def test_what_a_method_needs_takes_and_what_comes_back():
    attack = {"point": "a", "stage": "attacked", "label": "int4", "attack": {"name": "quantization"}}
    attacked = {"K-FAC": [attack | {"recovered": {"strict_acc": [0.25, 0.1, 0.4]}}]}
    attacked["deletion"] = [attack | {"recovered": {"strict_acc": None}}]
    titles, lines = needs_lines([*ROWS[:3], row("deletion", 1.0, 0.0, 74.0, falling=False)], 0.1, attacked)
    assert titles == ["needs", "time", "int4"]
    assert [(label, [cell.text for cell in cells]) for label, cells in lines] == [
        ("K-FAC", ["curvature", "0:03", "25%"]),
        ("deletion", ["curvature", "0:03", "nothing was suppressed"]),
    ]


def test_the_attack_that_brings_most_back_is_named():
    attack = {"stage": "attacked", "attack": {"name": "noise"}}
    shares = {"a": [0.1, 0.0, 0.2], "b": [0.65, 0.5, 0.8], "c": None, "d": [None, None, None]}
    rows = [attack | {"point": name, "label": name, "recovered": {"strict_acc": one}} for name, one in shares.items()]
    assert most_recovered(rows) == "b (65 %)"
    assert most_recovered(rows[2:]) is None and most_recovered([]) is None


def test_names_of_users_are_no_markup():
    table = comparison_table([BASE, row("[red]x", 0.9, 0.0, 71.0)], 0.1)
    assert any("[red]x" in str(cell) for cell in table.columns[0]._cells)
