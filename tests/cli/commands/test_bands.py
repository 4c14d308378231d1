"""edit.py bands as a user runs it."""

import json
import os

import pytest

from lightning_kfac.cli.edit import main as edit_main
from tests.common import write_jsonl


def test_bands_of_the_demo(demo_factors, tmp_path, capsys):
    words = ["--factors", str(demo_factors), "--texts.memorized", "demo:planted_report.jsonl"]
    words += ["--texts.general", "embedded", "--max_tokens", "4000", "--output", str(tmp_path / "b")]
    edit_main(["bands", *words, "--shards", "16"])
    result = json.loads((tmp_path / "b" / "bands.json").read_text())
    assert result["against"] == "general" and result["n_positions"]["memorized"] == 100 * 111
    layer = result["layers"]["model.layers.3.mlp.up_proj"]
    assert len(layer["memorized"]["ratio"]["value"]) == 10 and "ratio" not in layer["general"]
    shown = capsys.readouterr().out
    assert "3 up" in shown and "the paper averages norms instead" in shown
    assert {"bands_3_up.png", "ratios_memorized.png"} <= set(os.listdir(tmp_path / "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--texts is missing"),
        ({"texts.a": "embedded", "against": "b"}, "--against b: no such text; there are a"),
        ({"texts.a": "embedded", "shards": 3}, "--shards must be at least 16"),
        ({"texts.a": "few"}, "2 rows, fewer than --shards 32"),
        ({"texts.a/b": "embedded"}, "the name 'a/b' may hold letters"),
    ],
)
def test_wrong_bands(demo_factors, tmp_path, capsys, changes, message):
    row = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    few = write_jsonl(tmp_path / "few.jsonl", [row, {**row, "suffix_ids": [4]}])
    changes = {name: few if value == "few" else value for name, value in changes.items()}
    words = ["--factors", str(demo_factors), "--output", str(tmp_path / "b")]
    with pytest.raises(SystemExit):
        edit_main(["bands", *words, *(part for n, v in changes.items() for part in (f"--{n}", str(v)))])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()
