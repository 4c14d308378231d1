"""The recommended command does what was measured, and its cost is said in words."""

import shlex

import pytest

from lightning_kfac.cli.advice import apply_words, cost_in_words, show_advice
from lightning_kfac.cli.edit import make_parser
from lightning_kfac.console import command_line
from lightning_kfac.editing.config import EditConfig

EDIT = {"blocks": [3, 4], "projections": ["gate", "up"], "rho": 0.84, "formula": "original", "seed": None}


@pytest.mark.parametrize("change", [{}, {"formula": "random", "seed": 2}, {"formula": "modified", "rho": 0.7}])
@pytest.mark.parametrize("model", [None, "some/model"])
def test_a_copied_command_makes_the_edit(change, model):
    edit = EDIT | change
    line = command_line("apply", *apply_words(edit, "runs/my run/factors", model, "runs/out"))
    words = shlex.split(line)
    parsed = make_parser(["apply"]).parse_args(words[words.index("apply") :]).apply
    given = {key: parsed[key] for key in EditConfig.__dataclass_fields__}
    expected = EditConfig(
        rho=edit["rho"], formula=edit["formula"], blocks=[3, 4], projections=["gate", "up"], seed=edit["seed"] or 0
    )
    assert EditConfig(**given) == expected
    assert (parsed.factors, parsed.model, parsed.output) == ("runs/my run/factors", model, "runs/out")


def test_costs_are_said_with_what_was_measured():
    before = {"strict_acc": 0.98, "perplexity": 70.0}
    after = {"strict_acc": 0.031, "perplexity": 73.5, "ndcg@10": 0.9512, "edit": {"relative_change": 0.852}}
    assert cost_in_words(before, after) == (
        "of 100 sequences that chose nothing it should recite about 3 (unedited: 98); perplexity 70 -> 73.5 (+5.0 %); "
        "nDCG@10 of its predictions 0.951 (unedited: 1); the weights change by 85 % of their norm"
    )
    assert "perplexity" not in cost_in_words(before, {"strict_acc": 0.0, "perplexity": None})


def test_the_command_stands_on_a_line_of_its_own(capsys):
    show_advice("lightning-kfac apply --rho 0.8", "nothing", ["A note."])
    assert capsys.readouterr().out == "Recommended:\n  lightning-kfac apply --rho 0.8\nExpect: nothing.\nA note.\n"
