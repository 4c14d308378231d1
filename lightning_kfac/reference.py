"""Which model was edited: what a comparison of an edited checkpoint needs."""

from typing import Any

from lightning_kfac.assets import resolve_path
from lightning_kfac.editor import EDIT_FILE
from lightning_kfac.errors import InputError
from lightning_kfac.json_files import read_json
from lightning_kfac.loading import load_config


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
