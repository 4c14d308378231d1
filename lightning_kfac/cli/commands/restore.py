"""Give the edited layers of a checkpoint their original weights back."""

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.assets import resolve_path
from lightning_kfac.cli.options import (
    add_model_options,
    check_not_within,
    open_model,
    output_folder,
    room_for_checkpoint,
)
from lightning_kfac.console import console, counted
from lightning_kfac.editing.patch import restore_layers
from lightning_kfac.errors import InputError
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import ModelSource, found_again
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.run_folder import EDIT_FILE

# In the folder of a restored checkpoint: where its weights come from.
RESTORED = "restored.json"


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, required=True)
    parser.add_argument("--original", type=str, help="The unedited model; by default the one that edit.json names.")
    parser.add_argument("--output", type=str, required=True, help="Folder of the restored model.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier restore wrote there.")


def run(options: Namespace) -> None:
    """Restores and writes."""
    trusted = options.trust_remote_code
    path = resolve_path(options.model) / EDIT_FILE
    try:
        details = read_json(path, "edit the model again")
        layers = [layer["name"] for layer in details["layers"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: missing or unreadable: {options.model} is no model that was edited here") from None
    edited = ModelSource.named(options.model, options.revision, options.gguf_file, options.adapter, trusted)
    source = ModelSource.recorded(found_again(details, path.parent), trusted)
    if options.original:
        source = ModelSource.named(options.original, trust_remote_code=trusted)
    if source is None:
        raise InputError(f"{path}: does not name the original model; name it with --original")
    check_not_within(Path(options.output), {"the model": edited, "the original": source})
    with output_folder(options, "restore") as output:
        room_for_checkpoint(output, edited)
        _restore(options, layers, edited, source, details.get("fingerprint"), output.new)
    console.print(f"restored -> {output.path}/")


def _restore(
    options: Namespace, layers: list[str], edited: ModelSource, source: ModelSource, known: str | None, output: Path
) -> None:
    console.print(f"give {counted(len(layers), 'layer')} of {options.model} the weights of {source}")
    model = open_model(edited, options)
    original = open_model(source, options)
    if known and weights_fingerprint(original, layers) != known:
        raise InputError(f"{source}: these are not the weights that were edited; name the right model with --original")
    restore_layers(model, original.to(next(model.parameters()).dtype), layers)
    extra = {RESTORED: json.dumps({"model": options.model, "original": str(source), "layers": layers}, indent=2)}
    save_checkpoint(model, None, output, extra=extra, source=edited, changed=layers, like=source)
