"""Writing models as Hugging Face checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import full_state, is_sharded
from lightning_kfac.models.language import language_model
from lightning_kfac.storage.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_checkpoint(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes config, safetensors and tokenizer to ``path``; the folder appears when it is complete.

    Of a sharded model all ranks must call it; rank 0 writes.

    Args:
        tokenizer: Saved beside the model, if there is one.
        dtype: Cast the stored weights; the model itself keeps its own.
        extra: Further text files, name to contents.
    """
    state = full_state(model)
    if is_sharded(model) and current_ranks().rank:
        return
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    with new_folder(path) as partial:
        language_model(model).save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, contents in (extra or {}).items():
            (partial / name).write_text(contents, "utf-8")
