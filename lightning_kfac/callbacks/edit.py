"""EditCallback: edits the model when the collection has ended, saves it, and has it evaluated again."""

import json
from importlib.metadata import version
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from lightning_kfac.callbacks.collector import find_collector
from lightning_kfac.callbacks.save_model import save_checkpoint
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.report import EditReport
from lightning_kfac.editor import EDIT_FILE, KFACEditor


class EditCallback(Callback):
    """Applies a curvature edit at the end of ``fit``.

    Args:
        config: What to edit and how.

    Attributes:
        report: What the edit did, after the fit.

    Example:
        >>> import tempfile, lightning
        >>> from lightning_kfac.callbacks import CurvatureCollector
        >>> from lightning_kfac.data.datamodule import TextData
        >>> from lightning_kfac.modules import CausalLM
        >>> collector = CurvatureCollector(blocks=[3], projections=["up"])
        >>> edit = EditCallback(EditConfig(rho=0.8))
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, callbacks=[collector, edit], default_root_dir=tempfile.mkdtemp(), accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = TextData(max_tokens=500, seq_len=100, tokenizer="demo")
        >>> trainer.fit(CausalLM("demo"), data)
        >>> edit.report.layers[0].mass_kept >= 0.8
        True
    """

    def __init__(self, config: EditConfig):
        self.config = config
        self.report: EditReport | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector = find_collector(trainer)
        if trainer.enable_validation and not pl_module.results:  # the fit was cut short: no baseline yet
            trainer.fit_loop.epoch_loop.val_loop.run()
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
