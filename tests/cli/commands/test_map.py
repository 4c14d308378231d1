"""edit.py map as a user runs it."""

import json

import pytest
import torch

from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.collection.coupling import layer_coupling
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.loading import load_model
from lightning_kfac.math.statistics import rank_correlation
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.storage.results import append_result
from tests.common import failed


def scan_of(folder, drops):
    """What a scan writes, of edits of one projection alone."""
    append_result(folder / "results.jsonl", {"stage": "baseline", "edit": None, "strict_acc": 1.0})
    for (block, projection), drop in drops.items():
        edit = {"blocks": [block], "projections": [projection], "formula": "original", "rho": 0.6}
        append_result(folder / "results.jsonl", {"stage": "edited", "edit": edit, "strict_acc": 1.0 - drop})
    return folder


def test_map_of_the_demo(tmp_path, few, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    drops = {(2, "up"): 0.3, (3, "up"): 0.5, (4, "up"): 0.2, (9, "up"): 0.9}
    (tmp_path / "scan").mkdir()
    words = ["map", "--model", "demo", "--memorized", str(few), "--max_tokens", "600", "--projections", "[up]"]
    edit_main([*words, "--scan", str(scan_of(tmp_path / "scan", drops)), "--output", str(tmp_path / "m")])
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "m" / "map.json").read_text())
    values = [layer["memorized"] / layer["ordinary"] for layer in found["layers"].values()]
    assert len(values) == 6 and all(f"{value:.2f}" in said for value in values)
    best = max(range(4), key=lambda first: sum(values[first : first + 3]))
    assert found["recommended_blocks"] == [best, best + 1, best + 2]
    assert f"--collect.blocks '[{best},{best + 1},{best + 2}]' --edit.rho 0.6" in said
    expected = rank_correlation(values[2:5], [0.3, 0.5, 0.2])
    assert found["rank_correlation_with_scan"] == expected and f"took away: {expected:+.2f} (3 places)" in said
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"manifest.jsonl", "map.json", "map.png"}
    # Suffixes alone count, row by row.
    model = load_model("demo")
    rows = load_memorized(str(few), load_tokenizer("demo"), 2048)
    batches = [
        {"input_ids": ids, "labels": ids.clone().index_fill(1, torch.arange(len(row.prefix)), -100)}
        for row in rows
        for ids in [torch.tensor([[*row.prefix, *row.suffix]])]
    ]
    alone = layer_coupling(model, batches, resolve_targets(model, "all", ["up"]))
    assert [layer["memorized"] for layer in found["layers"].values()] == pytest.approx(list(alone.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projections": "[side]"}, "side"),
        ({"scan": "nothing"}, "nothing: no results of a scan; give the folder that `scan` wrote"),
        ({"memorized": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read: No such file"),
    ],
)
def test_wrong_maps(tmp_path, few, capsys, options, message):
    said = failed(capsys, "map", **{"model": "demo", "memorized": few, "output": tmp_path / "m", **options})
    assert message in " ".join(said.split()) and not (tmp_path / "m").exists()
