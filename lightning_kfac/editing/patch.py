"""Portable edits: a patch holds the changed weights of a model and the fingerprints of before and after.

A folder with ``patch.safetensors``, ``edit.json`` and a model card.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.distributed.sharding import whole
from lightning_kfac.editing.model_card import CARD, model_card
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.source import found_again
from lightning_kfac.storage.files import new_folder, settle
from lightning_kfac.storage.hub import local_folder
from lightning_kfac.storage.json_files import read_json, write_json
from lightning_kfac.storage.run_folder import EDIT_FILE
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

WEIGHTS = "patch.safetensors"
ADVICE = "make the patch again"


def save_patch(
    model: nn.Module,
    layers: Sequence[str],
    path: str | Path,
    before: str,
    details: Mapping[str, Any],
    write: bool = True,
) -> None:
    """Writes the weights of some layers of an edited model.

    Args:
        model: Edited.
        layers: Dotted names of the changed layers.
        path: Folder; it appears when it is complete.
        before: ``weights_fingerprint(model, layers)`` before the edit.
        details: Contents of ``edit.json``.
        write: False on ranks that only help to put a sharded model's weights together.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential()
        >>> model.fc = nn.Linear(2, 2)
        >>> before = weights_fingerprint(model, ["fc"])
        >>> old = model.fc.weight.detach().clone()
        >>> _ = nn.init.zeros_(model.fc.weight)
        >>> path = tempfile.mkdtemp() + "/patch"
        >>> save_patch(model, ["fc"], path, before, {"why": "an example"})
        >>> _ = model.fc.weight.data.copy_(old)
        >>> apply_patch(model, path)["why"], model.fc.weight.abs().sum().item()
        ('an example', 0.0)
    """
    patch = {"before": before, "after": weights_fingerprint(model, layers)}
    weights = {}
    found = find_layers(model)
    for name in layers:  # of a sharded model all ranks put a weight together, and one keeps it
        weight = whole(found[name].parameter.detach())
        if write:
            weights[name] = found[name].part(weight).cpu().contiguous()
    if not write:
        return
    with new_folder(path) as partial:
        checksum = save_tensors(weights, partial / WEIGHTS)
        about = {**details, "patch": patch | {"checksum": checksum}}
        write_json(partial / EDIT_FILE, about)
        (partial / CARD).write_text(model_card(about), "utf-8")


@torch.no_grad()
def apply_patch(model: nn.Module, path: str | Path, force: bool = False) -> dict[str, Any]:
    """Puts a patch's weights into the model that it was made from.

    Args:
        model: Unedited.
        path: Folder, or name of a Hugging Face hub repository.
        force: Apply it to other weights as well.

    Returns:
        Contents of ``edit.json``; ``patch.forced`` says whether the model was another one.

    Raises:
        InputError: Not a patch, damaged, or made from another model or other weights.
    """
    path = local_folder(path)
    details, weights = _read(path)
    prints = details["patch"]
    before = prints["before"]
    after = prints["after"]
    layers = find_layers(model)
    if missing := [name for name in weights if name not in layers]:
        raise InputError(f"{path}: the patch is of another model: this one has no layer {missing[0]}")
    ours = {name: layers[name].part(layers[name].parameter) for name in weights}
    for name, weight in weights.items():
        if (shape := ours[name].shape) != weight.shape:
            raise InputError(f"{path}: {name} is {list(weight.shape)} in the patch, {list(shape)} in the model")
    found = weights_fingerprint(model, weights)
    if found == after:
        raise InputError(f"{path}: the model already carries this patch")
    if found != before and not force:
        raise InputError(
            f"{path}: the patch was made from other weights (fingerprint {before[:8]}, the model has {found[:8]}) of "
            f"{details.get('model')}; force=True applies it all the same",
            "force=True",
        )
    old = {name: weight.clone() for name, weight in ours.items()}
    for name, weight in weights.items():
        ours[name].copy_(weight)
    exact = all(ours[name].dtype == weight.dtype for name, weight in weights.items())
    if found == before and exact and weights_fingerprint(model, weights) != after:
        for name, weight in old.items():
            ours[name].copy_(weight)
        raise InputError(f"{path}: the patch is damaged: the patched weights have another fingerprint than it says")
    return details | {"patch": prints | {"forced": found != before}}


def patch_source(path: str | Path) -> dict[str, Any]:
    """What a patch's ``edit.json`` says, among it the model that it was made from."""
    folder = local_folder(path)
    return found_again(_read(folder)[0], folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settle(path)
    if not ((path / EDIT_FILE).is_file() and (path / WEIGHTS).is_file()):
        raise InputError(f"{path}: not a patch: it needs {WEIGHTS} and {EDIT_FILE}")
    details = read_json(path / EDIT_FILE, ADVICE)
    patch = details.get("patch")
    if not (isinstance(patch, dict) and all(isinstance(patch.get(key), str) for key in ("before", "after"))):
        raise InputError(f"{path / EDIT_FILE}: damaged or incomplete: no fingerprints of before and after; {ADVICE}")
    weights = load_tensors(path / WEIGHTS, ADVICE, checksum=patch.get("checksum"))
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise InputError(f"{path / WEIGHTS}: damaged or incomplete: {name} is {weight.dtype}; {ADVICE}")
    return details, weights


@torch.no_grad()
def restore_layers(model: nn.Module, original: nn.Module, layers: Sequence[str]) -> None:
    """Gives layers of an edited model the weights of the original one, bit for bit.

    Args:
        original: The unedited model, as ``load_model`` gives it.
        layers: Dotted names, for one those in ``edit.json``.

    Raises:
        InputError: A layer is not in both, or the models differ in dtype.
    """
    ours = find_layers(model)
    theirs = find_layers(original)
    for name in layers:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise InputError(f"{name}: the two models do not have this layer in common")
        if ours[name].dtype != theirs[name].dtype:
            raise InputError(f"{name}: {ours[name].dtype} here, {theirs[name].dtype} in the original")
    for name in layers:
        ours[name].write(ours[name].parameter.data, theirs[name].W)
