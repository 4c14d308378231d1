"""Writing models: Hugging Face checkpoints, and what an edit made of one."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_kfac.assets import resolve_path
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import is_sharded
from lightning_kfac.editing.patch import save_patch
from lightning_kfac.editing.report import EditReport
from lightning_kfac.errors import InputError
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.loading import load_config
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.run_folder import EDIT_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Save = Literal["full", "patch", "none"]


def save_edited(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    report: EditReport,
    *,
    source: str | None,
    fingerprint: str,
    factors: Mapping[str, Any] | None = None,
    save: Save = "full",
) -> None:
    """Writes an edited model with ``edit.json``: as a checkpoint, or as a patch of its source.

    In a distributed run all ranks may call it, and of a sharded model all must; rank 0 writes.

    Args:
        tokenizer: Saved beside a checkpoint, if there is one.
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
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "factors": dict(factors or {}),
        "version": version("lightning-kfac"),
    }
    if save == "full":
        save_checkpoint(model, tokenizer, path, extra={EDIT_FILE: json.dumps(details, indent=2)})
    elif save == "patch":
        save_patch(model, [layer.name for layer in report.layers], path, fingerprint, details, write=rank == 0)


def edit_details(model_name: str | None) -> dict[str, Any]:
    """What ``edit.json`` in a model's folder says; empty where there is none."""
    path = resolve_path(model_name) / EDIT_FILE if model_name else None
    if path is None or not path.is_file():
        return {}
    return read_json(path, "edit the model again, or remove the file")


def find_reference(
    model_name: str | None, named: str | None, vocab_size: int, trust_remote_code: bool = False
) -> tuple[str | None, str]:
    """The unedited model to compare with, and, where there is none, why.

    Args:
        model_name: The model that is evaluated.
        named: What the user named, if anything; otherwise the model that ``edit.json`` names.
        vocab_size: Of the model that is evaluated.
        trust_remote_code: Let the reference's repository run its own code.

    Raises:
        InputError: A model that the user named cannot be used.
    """
    recorded = edit_details(model_name).get("model")
    name = named or recorded
    if not name:
        return None, "no unedited model is known"
    try:
        theirs = load_config(name, None, trust_remote_code).get_text_config().vocab_size
    except InputError as error:
        if named:
            raise
        return None, f"the model that was edited cannot be found ({error})"
    if theirs != vocab_size:
        raise InputError(f"model.reference {name} has a vocabulary of {theirs}, the model {model_name} of {vocab_size}")
    return name, ""
