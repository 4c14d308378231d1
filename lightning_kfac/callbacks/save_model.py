"""SaveTrainedModel: keeps what a training made."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_kfac.console import console
from lightning_kfac.models.checkpoints import save_checkpoint


class SaveTrainedModel(Callback):
    """After a training, writes the model to ``<run>/model``, in float16."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "model"
            save_checkpoint(pl_module.model, trainer.datamodule.tokenizer, path, torch.float16)
            console.print(f"model -> {path}")
