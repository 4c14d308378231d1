"""SaveTrainedModel: keeps what a training made."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.console import console
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.modules.text_data import text_data


class SaveTrainedModel(Callback):
    """After a training, writes the model to ``<run>/model``, in float16."""

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "model"
            save_checkpoint(causal_lm(pl_module).loaded, text_data(trainer).tokenizer, path, torch.float16)
            console.print(f"model -> {path}")
