"""The example notebook runs from top to bottom, and its figures are what it says."""

import json
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_runs(capsys):
    """Cell by cell in one namespace, as a kernel does; with less text than it ships with."""
    notebook = json.loads((EXAMPLES / "edit_a_model.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = "".join(json.dumps(cell.get("outputs", [])) for cell in notebook["cells"])
    assert "100 of 200 passages are recited word for word" in shown and "image/png" in shown
    assert "Traceback" not in shown
    names = {}
    for number, cell in enumerate(cells):
        cell = cell.replace("n_tokens, n_heldout = 30_000, 10_000", "n_tokens, n_heldout = 6_000, 2_000")
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["n_tokens"] == 6_000 and len(names["recited"]) == 100
    assert names["after"].strict_accuracy < 0.2 < names["score"].strict_accuracy
    assert 1 < names["after_ppl"] / names["before_ppl"] < 1.3
    for one, other in zip(names["model"].parameters(), names["baseline"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert "100 of 200 passages are recited word for word" in capsys.readouterr().out
