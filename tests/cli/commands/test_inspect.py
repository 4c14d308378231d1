"""edit.py inspect as a user runs it."""

import json

import pytest
import torch

from lightning_kfac import EditConfig, KFACEditor, collect_factors, load_factors, save_factors
from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.evaluation.excitation import excitation, layer_forms
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.loading import load_model
from tests.common import VOCAB, build_model


def test_layers_without_a_block(tmp_path):
    """The output layer has neither block nor projection, and the decoder alone does not run it."""
    ids = torch.arange(1, 513).view(8, 64)
    modules = ["lm_head", r".*layers\.2.*up_proj"]
    factors = collect_factors(build_model("llama"), [{"input_ids": ids % VOCAB}], modules=modules)
    save_factors(factors, tmp_path / "f", {"model": "none", "n_tokens": 1})
    edit_main(["inspect", "--factors", str(tmp_path / "f"), "--output", str(tmp_path / "i")])
    assert (tmp_path / "i" / "kept_lm_head.png").exists()
    model = build_model("llama")
    forms = layer_forms(model, factors, BasisCache.beside(factors), 3)
    found = excitation(model, factors, forms, [[{"input_ids": ids % VOCAB}]])
    assert (found["lm_head"].energies > 0).all()


def test_inspect_writes_figures(demo_factors, tmp_path, capsys):
    words = ["--factors", str(demo_factors), "--rhos", "[0.6, 0.8]", "--output", str(tmp_path / "i")]
    edit_main(["inspect", *words])
    names = {p.name for p in (tmp_path / "i").iterdir()}
    assert {"spectra.json", "kept_3_gate.png", "spectra_up_mass.png", "tensorboard"} <= names
    numbers = json.loads((tmp_path / "i" / "spectra.json").read_text())
    assert set(numbers) == {"model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"}
    with pytest.raises(SystemExit):
        edit_main(["inspect", *words])
    assert "add --overwrite to replace it" in capsys.readouterr().err


def test_inspect_tells_what_edits_cost(demo_factors, tmp_path, capsys):
    """As the editor's diagonal form does, of every formula for which there is what it needs; rho 1 costs nothing."""
    words = ["--factors", str(demo_factors), "--rhos", "[0.6, 1.0]", "--output", str(tmp_path / "i")]
    edit_main(["inspect", *words, "--prices", "--dtype", "float32"])
    said = capsys.readouterr().out
    prices = json.loads((tmp_path / "i" / "prices.json").read_text())
    assert list(prices) == ["original", "modified", "foof"] and (tmp_path / "i" / "prices.png").exists()
    editor = KFACEditor(load_model("demo", "float32"), load_factors(demo_factors))
    for formula, of_rho in prices.items():
        _, changes = editor.changes(EditConfig(rho=0.6, formula=formula))
        assert of_rho["0.6"] == pytest.approx(sum(editor.diagonal_price(*change) for change in changes.items()))
        assert of_rho["0.6"] > 0 and of_rho["1.0"] == 0
        assert f"{of_rho['0.6']:+.4f}" in said
