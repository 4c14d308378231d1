"""Writing models: Hugging Face checkpoints, and what an edit made of one."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lightning_kfac.editing.patch import save_patch
from lightning_kfac.editing.report import EditReport
from lightning_kfac.editor import EDIT_FILE
from lightning_kfac.files import new_folder
from lightning_kfac.ranks import current_ranks
from lightning_kfac.sharding import full_state, is_sharded

Save = Literal["full", "patch", "none"]


def save_checkpoint(
    model: nn.Module,
    tokenizer,
    path: Path,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes config, safetensors and tokenizer to ``path``; the folder appears when it is complete.

    Of a sharded model all ranks must call it; rank 0 writes.

    Args:
        dtype: Cast the stored weights; the model itself keeps its own.
        extra: Further text files, name to contents.
    """
    state = full_state(model)
    if is_sharded(model) and current_ranks().rank:
        return
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    with new_folder(path) as partial:
        model.save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, contents in (extra or {}).items():
            (partial / name).write_text(contents, "utf-8")


def save_edited(
    model: nn.Module,
    tokenizer,
    path: Path,
    report: EditReport,
    *,
    source: str | None,
    fingerprint: str,
    factors: Mapping | None = None,
    save: Save = "full",
) -> None:
    """Writes an edited model with ``edit.json``: as a checkpoint, or as a patch of its source.

    In a distributed run all ranks may call it, and of a sharded model all must; rank 0 writes.

    Args:
        path: Folder of the checkpoint or the patch.
        report: What the edit did.
        source: Name or folder of the model that was edited.
        fingerprint: ``weights_fingerprint`` of the edited layers before the edit.
        factors: Metadata of the factors.
        save: ``full``, ``patch`` or ``none``.
    """
    rank = current_ranks().rank
    if rank and not is_sharded(model):
        return
    details = report.to_dict() | {
        "summary": report.summary(),
        "model": source,
        "fingerprint": fingerprint,
        "factors": dict(factors or {}),
        "version": version("lightning-kfac"),
    }
    if save == "full":
        save_checkpoint(model, tokenizer, path, extra={EDIT_FILE: json.dumps(details, indent=2)})
    elif save == "patch":
        save_patch(model, [layer.name for layer in report.layers], path, fingerprint, details, write=rank == 0)
