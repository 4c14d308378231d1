"""Writing models: Hugging Face checkpoints, and what an edit made of one."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import is_sharded
from lightning_kfac.editing.model_card import CARD, model_card
from lightning_kfac.editing.patch import save_patch
from lightning_kfac.errors import InputError
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.loading import load_config
from lightning_kfac.models.source import ModelSource, found_again
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.run_folder import EDIT_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Save = Literal["full", "patch", "none"]


class Named(Protocol):
    """A layer that was changed."""

    @property
    def name(self) -> str:
        """Its dotted name."""


class Report(Protocol):
    """What was done to a model: an ``EditReport``, or that of another method."""

    @property
    def layers(self) -> Sequence[Named]:
        """What was done to each layer."""

    def summary(self) -> dict[str, Any]:
        """The field ``edit`` of a result."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, for ``edit.json``."""


def save_edited(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    report: Report,
    *,
    source: ModelSource | str | None,
    fingerprint: str,
    factors: Mapping[str, Any] | None = None,
    save: Save = "full",
) -> None:
    """Writes an edited model with ``edit.json`` and a model card: as a checkpoint, or as a patch of its source.

    A checkpoint is its source's in everything but the edited layers, see ``save_checkpoint``.

    In a distributed run all ranks may call it, and of a sharded model all must; rank 0 writes.

    Args:
        tokenizer: Saved beside a checkpoint whose source has none of its own.
        path: Folder of the checkpoint or the patch.
        report: What the edit did.
        source: The model that was edited.
        fingerprint: ``weights_fingerprint`` of the edited layers before the edit.
        factors: Metadata of the factors.
        save: ``full``, ``patch`` or ``none``.
    """
    rank = current_ranks().rank
    if rank and not is_sharded(model):
        return
    known = None if source is None else ModelSource.named(source)
    details = report.to_dict() | {
        "summary": report.summary(),
        "model": None,
        **(known.about() if known else {}),
        "fingerprint": fingerprint,
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "factors": dict(factors or {}),
        "version": version("lightning-kfac"),
    }
    layers = [layer.name for layer in report.layers]
    if save == "full":
        extra = {EDIT_FILE: json.dumps(details, indent=2), CARD: model_card(details)}
        save_checkpoint(model, tokenizer, path, extra=extra, source=known, changed=layers)
    elif save == "patch":
        save_patch(model, layers, path, fingerprint, details, write=rank == 0)


def edit_details(model_name: str | ModelSource | None) -> dict[str, Any]:
    """What ``edit.json`` in a model's folder says; empty where there is none."""
    path = ModelSource.named(model_name).path / EDIT_FILE if model_name else None
    if path is None or not path.is_file():
        return {}
    return found_again(read_json(path, "edit the model again, or remove the file"), path.parent)


def find_reference(model: ModelSource | None, named: str | None, vocab_size: int) -> tuple[ModelSource | None, str]:
    """The unedited model to compare with, and, where there is none, why.

    Args:
        model: The model that is evaluated.
        named: What the user named, if anything; otherwise the model that ``edit.json`` names.
        vocab_size: Of the model that is evaluated.

    Raises:
        InputError: A model that the user named cannot be used.
    """
    trusted = model is not None and model.trust_remote_code
    recorded = ModelSource.recorded(edit_details(model), trusted)
    reference = ModelSource.named(named, trust_remote_code=trusted) if named else recorded
    if reference is None:
        return None, "no unedited model is known"
    try:
        theirs = load_config(reference).get_text_config().vocab_size
    except InputError as error:
        if named:
            raise
        return None, f"the model that was edited cannot be found ({error})"
    if theirs != vocab_size:
        raise InputError(f"model.reference {reference} has a vocabulary of {theirs}, the model {model} of {vocab_size}")
    return reference, ""
