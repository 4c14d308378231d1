"""edit.py bands as a user runs it."""

import io
import json
import os

import numpy as np
import pytest

from lightning_kfac.cli.commands.bands import _bounds, _table
from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.console import PlainConsole
from lightning_kfac.data.loaders import TokenRows
from lightning_kfac.math.bands import Bands
from tests.common import write_jsonl


def test_bands_of_the_demo(demo_factors, tmp_path, capsys):
    words = ["--factors", str(demo_factors), "--texts.memorized", "demo:planted_report.jsonl"]
    words += ["--texts.general", "embedded", "--max_tokens", "4000", "--output", str(tmp_path / "b")]
    edit_main(["bands", *words, "--seq_len", "32"])
    result = json.loads((tmp_path / "b" / "bands.json").read_text())
    assert result["against"] == "general" and result["n_positions"]["memorized"] == 100 * 111
    layer = result["layers"]["model.layers.3.mlp.up_proj"]
    assert len(layer["memorized"]["ratio"]["value"]) == 10 and "ratio" not in layer["general"]
    shown = capsys.readouterr().out
    assert "3 up" in shown and "the paper averages norms instead" in shown
    whitening = layer["memorized"]["whitening"]
    assert whitening["inputs"]["low"] < whitening["inputs"]["value"] < whitening["inputs"]["high"]
    assert (
        "Whitening exponent of memorized against general" in " ".join(shown.split())
        and "whitening" not in layer["general"]
    )
    assert {"bands_3_up.png", "ratios_memorized.png", "whitening_memorized.png"} <= set(os.listdir(tmp_path / "b"))


def test_singular_bands_between_the_paper_s_cuts(demo_factors, tmp_path):
    words = ["--factors", str(demo_factors), "--texts.memorized", "demo:planted_report.jsonl", "--max_tokens", "2000"]
    words += ["--texts.general", "embedded", "--seq_len", "32", "--output", str(tmp_path / "b")]
    edit_main(["bands", *words, "--directions", "svd", "--cuts", "[0.1, 0.25, 0.5, 1]"])
    result = json.loads((tmp_path / "b" / "bands.json").read_text())
    shares = result["layers"]["model.layers.3.mlp.up_proj"]["general"]["share"]["value"]
    assert len(shares) == 4 and sum(share**2 for share in shares) == pytest.approx(1, rel=1e-5)
    assert (result["directions"], result["cuts"]) == ("svd", [0.1, 0.25, 0.5, 1])


def test_the_table_is_as_wide_as_a_terminal():
    """With every figure in it."""
    values = np.linspace(0.8, 1.3, 10)
    bands = Bands(values, values - 0.04, values + 0.03)
    console = PlainConsole(width=80, record=True, file=io.StringIO())
    console.print(_table("memorized", "general", {"3 gate": bands, "13 gate_up": bands}))
    shown = console.export_text()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert shown.count("±0.04") == 20 and all(f"{value:.2f}" in shown for value in values)


def test_few_documents_give_no_intervals(demo_factors, tmp_path, capsys):
    """Whatever the number of rows: those of one document are no sample of others."""
    row = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    few = write_jsonl(tmp_path / "few.jsonl", [row, {**row, "suffix_ids": [4]}])
    (tmp_path / "long.txt").write_text(" ".join(f"word {i}" for i in range(4000)))
    words = ["--factors", str(demo_factors), "--texts.few", str(few), "--texts.long", str(tmp_path / "long.txt")]
    edit_main(["bands", *words, "--max_tokens", "4000", "--output", str(tmp_path / "b")])
    said = capsys.readouterr()
    assert said.err.count("intervals are n/a: they need 16 documents") == 2 and " n/a" in said.out
    layer = json.loads((tmp_path / "b" / "bands.json").read_text())["layers"]["model.layers.3.mlp.up_proj"]
    for figures in (layer["few"]["ratio"], layer["few"]["share"], layer["long"]["share"]):
        assert set(figures["low"]) == set(figures["high"]) == {None} and None not in figures["value"]


def test_shards_are_of_whole_documents():
    ends = np.array([3, 10, 11, 30])
    rows = TokenRows(np.arange(30, dtype=np.int32), np.array([0, 5, 10, 15, 20, 25, 30]), ends=ends)
    assert _bounds(rows, 32).tolist() == [0, 1, 2, 3, 6] and _bounds(rows, 2).tolist() == [0, 2, 6]
    assert _bounds(TokenRows(rows.tokens, rows.offsets, ends=ends[-1:]), 32).tolist() == [0, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--texts is missing"),
        ({"texts.a": "embedded", "against": "b"}, "--against b: no such text; there are a"),
        ({"texts.a": "embedded", "shards": 3}, "--shards must be at least 16"),
        ({"texts.a": "embedded", "cuts": "[0.5, 0.1]"}, "--cuts [0.5, 0.1]: at least two shares above 0"),
        ({"texts.a": "embedded", "cuts": "[0.5, 1.1]"}, "--cuts [0.5, 1.1]: at least two shares above 0"),
        ({"texts.a/b": "embedded"}, "the name 'a/b' may hold letters"),
    ],
)
def test_wrong_bands(demo_factors, tmp_path, capsys, changes, message):
    words = ["--factors", str(demo_factors), "--output", str(tmp_path / "b")]
    with pytest.raises(SystemExit):
        edit_main(["bands", *words, *(part for n, v in changes.items() for part in (f"--{n}", str(v)))])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()
