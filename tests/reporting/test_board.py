"""Figures, texts and tables in TensorBoard, in Weights & Biases (offline), and what a CSV file gets of them."""

import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_kfac.reporting.board import Board
from lightning_kfac.reporting.figures.comparison import metrics_figure
from lightning_kfac.reporting.tables import comparison_table
from tests.reporting.pages import AFTER, BEFORE

RECORDS = {"baseline": BEFORE, "edited": AFTER}


def shown_in(loggers):
    board = Board(loggers)
    board.figure("comparison/metrics", metrics_figure(RECORDS))
    board.text("continuations", "**edited**")
    board.table("before and after", comparison_table(RECORDS), ["a | word: what it means"])
    board.before_and_after(RECORDS)
    board.hyperparameters({"model": "demo"}, {"hp/strict_acc": 0.02})
    board.compared(
        {"unedited": {"which": "u"}, "edited": {"which": "e"}}, {"unedited": {"hp/x": 1.0}, "edited": {"hp/x": 0.0}}
    )
    return board


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    assert shown_in([logger]).takes_pictures
    logger.finalize("success")
    found = events(tmp_path / "tensorboard")
    assert found.Tags()["images"] == ["comparison/metrics"]
    text = found.Tensors("before and after/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| with 95 % intervals | unedited | edited | change |"
    assert "| strict accuracy | 0.980 \\[0.900, 0.990\\] | 0.020 \\[0.004, 0.105\\] |" in text and "a \\| word" in text
    for end, values in (("", [0.98, 0.02]), ("/low", [0.9, 0.004]), ("/high", [0.99, 0.105])):
        line = found.Scalars(f"comparison/strict_acc{end}")
        assert [(e.step, e.value) for e in line] == [(0, pytest.approx(values[0])), (1, pytest.approx(values[1]))]
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["before and after (0: unedited, 1: edited)"]
    series = charts["strict accuracy"].margin.series[0]
    assert series.value == "comparison/strict_acc" and series.lower == "comparison/strict_acc/low"
    for name, value in (("unedited", 1.0), ("edited", 0.0)):
        run = events(tmp_path / "tensorboard" / name)
        assert run.Scalars("hp/x")[0].value == value and "_hparams_/session_start_info" in str(run.summary_metadata)


def test_a_csv_file_gets_the_figures(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    assert not shown_in([logger]).takes_pictures
    with open(tmp_path / "metrics.csv") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert float(rows["0"]["comparison/perplexity"]) == 20.0 and float(rows["1"]["comparison/perplexity"]) == 21.0
    assert float(rows["1"]["comparison/strict_acc/high"]) == 0.105
    assert "model: demo" in (tmp_path / "hparams.yaml").read_text()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Needs the extra `wandb`: pip install lightning-kfac[wandb]."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    logger = WandbLogger(project="p", save_dir=tmp_path, offline=True)
    assert shown_in([logger]).takes_pictures
    summary = dict(logger.experiment.summary)
    config = dict(logger.experiment.config)
    wandb.finish()
    assert summary["comparison/perplexity"] == 21.0 and config["model"] == "demo"
    media = [path for path in Path(tmp_path).rglob("media/**/*") if path.is_file()]
    assert any(path.suffix == ".png" and "metrics" in path.name for path in media)
    tables = [json.loads(path.read_text()) for path in media if path.name.endswith(".table.json")]
    columns = [table["columns"] for table in tables]
    assert ["text"] in columns and ["with 95 % intervals", "unedited", "edited", "change"] in columns
