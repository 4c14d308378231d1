"""Adapters of peft: merged into the weights on request, and told apart from models."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_kfac.errors import InputError, cause
from lightning_kfac.models.model_folder import check_model_folder
from lightning_kfac.models.stored import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_advice(folder: Path, name: str) -> str | None:
    """How to use what a folder holds, where it is an adapter; None where it is not."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    if (folder / "config.json").is_file():
        return f"{name} holds a model and an adapter ({ADAPTER_CONFIG}): move one of them into a folder of its own"
    return (
        f"{name} is an adapter (peft), not a model: set model.model_name to the model that it was trained on "
        f"({base or 'which it does not name'}) and model.adapter to this folder, and it is merged into the weights"
    )


def check_peft(what: str) -> None:
    """Raises ``InputError`` where peft is not installed, which something needs."""
    if find_spec("peft") is None:
        raise InputError(f"{what} needs peft: pip install 'lightning-kfac[peft]'")


def check_adapter(adapter: str) -> None:
    """Raises ``InputError`` where an adapter cannot be merged: peft is not installed, or the folder holds none."""
    check_peft(f"model.adapter {adapter}: merging")
    if Path(adapter).is_dir():
        check_model_folder(Path(adapter))
    if Path(adapter).exists() and not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise InputError(f"model.adapter {adapter}: not an adapter: it has no {ADAPTER_CONFIG}")


def merge_adapter(model: "PreTrainedModel", adapter: str) -> "PreTrainedModel":
    """The model with an adapter's change in its weights.

    Raises:
        InputError: The adapter does not belong to the model, or changes no weights.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped: Any = PeftModel.from_pretrained(model, adapter)
        if lacking := [str(one.message) for one in said if "missing adapter keys" in str(one.message)]:
            raise ValueError(f"it is of another model: {lacking[0]}"[:200])
        if not hasattr(wrapped, "merge_and_unload"):
            raise ValueError("it changes the prompt, not the weights")
        merged = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # of peft, of safetensors, of the hub
        raise InputError(f"model.adapter {adapter}: cannot be merged: {cause(error)}") from error
    return cast("PreTrainedModel", merged.requires_grad_(False).eval())
