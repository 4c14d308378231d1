"""edit.json names the unedited model; that name holds when both folders have moved together."""

import pytest

from lightning_kfac.cli.main import main
from lightning_kfac.editing.edited_model import edit_details
from lightning_kfac.editing.patch import patch_source
from lightning_kfac.loading import load_model, load_tokenizer


@pytest.mark.parametrize("name", ["base", "absolute"])
def test_an_edit_and_its_model_move_together(name, demo_factors, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    (here / "models").mkdir(parents=True)
    monkeypatch.chdir(here)
    load_model("demo").save_pretrained("models/base")
    load_tokenizer("demo").save_pretrained("models/base")
    model = "models/base" if name == "base" else str(here / "models" / "base")
    words = ["apply", "--factors", str(demo_factors), "--model", model, "--rho", "0.6"]
    main([*words, "--output", "edits/full"])
    main([*words, "--output", "edits/patch", "--save", "patch"])
    here.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    moved = str(tmp_path / "there" / "models" / "base")
    assert edit_details(str(tmp_path / "there" / "edits" / "full"))["model"] == moved
    assert patch_source(tmp_path / "there" / "edits" / "patch")["model"] == moved
    assert capsys.readouterr().err.count(f"{moved} is taken for it") == 1
    main(["restore", "--model", "there/edits/full", "--output", "restored"])
    restored, before = load_model("restored").state_dict(), load_model(moved).state_dict()
    assert all((restored[key] == before[key]).all() for key in before)
    (tmp_path / "there" / "models" / "base").rename(tmp_path / "elsewhere")
    assert edit_details("there/edits/full")["model"] == model  # another model is never guessed
