"""edit.py forecast as a user runs it."""

import json
import math

import pytest
import torch
from jsonargparse import Namespace

from lightning_kfac import EditConfig, KFACEditor, load_factors
from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.cli.text_rows import text_rows
from lightning_kfac.evaluation.functions import perplexity
from lightning_kfac.loading import load_model, load_tokenizer
from lightning_kfac.models.layers import find_layers
from tests.common import failed


def test_forecast_of_the_demo(demo_factors, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["forecast", "--factors", str(demo_factors), "--max_tokens", "1200", "--formulas", "[original, random]"]
    words += ["--rhos", "[0.95, 1.0]", "--measure", "--output", str(tmp_path / "f")]
    edit_main(words)
    said = capsys.readouterr()
    assert "4 edits of demo on 1,200 tokens of embedded, in one pass" in said.out
    assert max(map(len, said.out.split("What edits will cost")[1].splitlines()[:8])) <= 80
    edits = json.loads((tmp_path / "f" / "forecast.json").read_text())["edits"]
    assert [(e["edit"]["formula"], e["edit"]["rho"]) for e in edits] == [
        ("original", 0.95), ("original", 1.0), ("random", 0.95), ("random", 1.0)
    ]  # fmt: skip
    for unchanged in (edits[1], edits[3]):  # rho 1 changes no bit
        assert unchanged["predicted"]["total"] == unchanged["measured"] == unchanged["diagonal"] == 0
    for edit in (edits[0], edits[2]):
        predicted = edit["predicted"]
        assert predicted["total"] == predicted["first"] + predicted["second"] and predicted["second"] > 0
        assert predicted["first"] == pytest.approx(sum(layer["first"] for layer in edit["layers"].values()), rel=1e-6)
    options = Namespace(max_tokens=1200, seq_len=128)
    rows = text_rows("embedded", load_tokenizer("demo"), 2048, options, tmp_path / "text")
    ids = [rows[number][1].tolist() for number in range(len(rows))]
    model = load_model("demo", "float32")
    before = math.log(perplexity(model, None, ids))
    KFACEditor(model, load_factors(demo_factors), EditConfig(rho=0.95)).apply()
    assert edits[0]["measured"] == pytest.approx(math.log(perplexity(model, None, ids)) - before, abs=1e-6)
    edit_main(["report", str(tmp_path / "f"), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "What edits will cost" in page and f"{edits[0]['predicted']['total']:+.4f}" in page
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"manifest.jsonl", "forecast.json", "price.png"}


def test_rectangles_with_a_share_for_each_side(demo_factors, tmp_path, capsys):
    words = ["forecast", "--factors", str(demo_factors), "--max_tokens", "600", "--formulas", "[original, rectangle]"]
    edit_main([*words, "--rhos", "[0.9]", "--rho_G", "0.5", "--output", str(tmp_path / "f")])
    original, rectangle = json.loads((tmp_path / "f" / "forecast.json").read_text())["edits"]
    assert (rectangle["edit"]["rho_G"], rectangle["edit"]["rho_A"]) == (0.5, 0.9) and "rho_G" not in original["edit"]
    (layer, *_) = load_factors(demo_factors).values()
    sides = []
    for matrix, rho in ((layer.G, 0.5), (layer.A, 0.9)):
        values = torch.linalg.eigvalsh(matrix.double()).clamp(min=0).flip(0)
        sides.append(int((values.cumsum(0) < rho * values.sum() * (1 - 1e-12)).sum()) + 1)
    report = KFACEditor(load_model("demo"), load_factors(demo_factors), EditConfig(0.9, "rectangle", rho_G=0.5)).apply()
    assert report.layers[0].n_kept == sides[0] * sides[1]
    assert report.fraction_kept == rectangle["edit"]["fraction_kept"]


def test_the_diagonal_form_against_brute_force(demo_factors):
    """Component by component; the model is as it was afterwards."""
    model = load_model("demo", "float32")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    factors = load_factors(demo_factors)
    editor = KFACEditor(model, factors, EditConfig(rho=0.8))
    report, changes = editor.changes()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert report.layers[0].n_kept < report.layers[0].n_total and set(changes) == set(factors)
    editor.apply()
    for name, dW in changes.items():
        assert torch.equal(find_layers(model)[name].W - before[f"{name}.weight"], dW)
        (mu, V), (lam, U) = (torch.linalg.eigh(getattr(factors[name], side).double()) for side in "AG")
        price = 0.0
        for i in range(len(lam)):
            along = (U[:, i] @ dW.double()) @ V
            price += float((lam[i].clamp(min=0) * mu.clamp(min=0) * along**2).sum()) / 2
        assert editor.diagonal_price(name, dW) == pytest.approx(price, rel=1e-6)
    editor.restore()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rhos": "[]"}, "--rhos and --formulas must each name at least one"),
        ({"rhos": "[1.5]"}, "rho is 1.5"),
        ({"rho_G": 0.5}, "--rho_G and --rho_A are of the formula rectangle, which --formulas does not name"),
        ({"formulas": "[corrected]"}, "formula corrected needs moments"),
        ({"formulas": "[coupled]"}, "formula coupled needs coupled factors: collect with --collect.coupled true"),
        ({"text": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_wrong_forecasts(demo_factors, tmp_path, capsys, options, message):
    said = failed(capsys, "forecast", **{"factors": demo_factors, "output": tmp_path / "f", **options})
    assert message in " ".join(said.split())
    assert not (tmp_path / "f").exists()
