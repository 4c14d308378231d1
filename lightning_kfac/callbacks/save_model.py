"""Saving models as Hugging Face checkpoints."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_kfac.progress import console


def save_checkpoint(
    model: nn.Module,
    tokenizer,
    path: Path,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes config, safetensors and tokenizer to ``path``; the folder appears when it is complete.

    Args:
        dtype: Cast the stored weights; the model itself keeps its own.
        extra: Further text files, name to contents.
    """
    partial = path.with_name(path.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    state = model.state_dict()
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(partial, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    for name, contents in (extra or {}).items():
        (partial / name).write_text(contents, "utf-8")
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


class SaveTrainedModel(Callback):
    """After a training, writes the model to ``<run>/model``, in float16."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "model"
            save_checkpoint(pl_module.model, trainer.datamodule.tokenizer, path, torch.float16)
            console.print(f"model -> {path}")
