"""What RunReport leaves of extraction: the curves for a report, and a figure in TensorBoard."""

import json
from types import SimpleNamespace

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kfac.callbacks.report import RunReport
from lightning_kfac.metrics.extraction import CURVE
from lightning_kfac.storage.run_folder import RunFolder


def test_curves_are_kept_and_drawn(tmp_path):
    report = RunReport(RunFolder(tmp_path), "", "")
    logger = TensorBoardLogger(tmp_path, "tensorboard", "")
    trainer = SimpleNamespace(loggers=[logger])
    report.show_extraction(trainer)
    assert not (tmp_path / "extraction.json").exists()
    report.curves = {"memorized": {"baseline": [0.5] * len(CURVE), "edited": [0.0] * len(CURVE)}}
    report.evaluations = {"baseline": {"intervals": {"extraction.expected_at.10": [0.25, 0.75]}}, "edited": {}}
    report.show_extraction(trainer)
    assert json.loads((tmp_path / "extraction.json").read_text()) == {"tries": list(CURVE), "curves": report.curves}
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["comparison/extraction by sampling"]
