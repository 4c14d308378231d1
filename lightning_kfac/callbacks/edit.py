"""EditCallback: edits the model when the collection has ended, saves it, and has it evaluated again."""

import json
from importlib.metadata import version
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from lightning_kfac.callbacks.collector import find_collector
from lightning_kfac.callbacks.save_model import save_checkpoint
from lightning_kfac.editor import EDIT_FILE, EditConfig, EditReport, KFACEditor


class EditCallback(Callback):
    """Applies a curvature edit at the end of ``fit``.

    Args:
        config: What to edit and how.

    Attributes:
        report: What the edit did, after the fit.
    """

    def __init__(self, config: EditConfig):
        self.config = config
        self.report: EditReport | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector = find_collector(trainer)
        self.report = KFACEditor(pl_module.model, collector.factors, self.config).apply()
        if trainer.is_global_zero:
            details = self.report.to_dict() | {"factors": collector.metadata, "version": version("lightning-kfac")}
            path = Path(trainer.default_root_dir) / "edited"
            save_checkpoint(
                pl_module.model, trainer.datamodule.tokenizer, path, extra={EDIT_FILE: json.dumps(details, indent=2)}
            )
        pl_module.stage = "edited"
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.run()
