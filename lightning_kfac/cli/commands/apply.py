"""Edit a model with saved factors, or apply a patch, and write the result."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.figures_out import RETURNED
from lightning_kfac.cli.next_steps import after_edit, show_next
from lightning_kfac.cli.options import (
    add_editing_options,
    add_model_options,
    check_not_within,
    editor_options,
    free_space_for,
    model_tokenizer,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
    output_folder,
    room_for_checkpoint,
)
from lightning_kfac.console import console, show
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import Save, save_edited
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.model_card import CARD, model_card
from lightning_kfac.editing.patch import apply_patch, patch_source
from lightning_kfac.errors import InputError
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.dtypes import stored_dtype
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.reporting.edit_table import LEGEND, report_table
from lightning_kfac.storage.output_folder import OutputFolder
from lightning_kfac.storage.run_folder import EDIT_FILE

FIGURES = RETURNED
Applied = tuple[str, dict[str, Any]]  # the model's name, and what was done


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    add_editing_options(parser)
    parser.add_argument("--patch", type=str, help="Instead of factors: a patch (folder or hub repository) to apply.")
    parser.add_argument("--output", type=str, help="Folder of the edited model, or of the patch.")
    parser.add_argument("--save", type=Save, default="full", help="Write a checkpoint, a patch of it, or nothing.")
    parser.add_argument("--dry_run", action="store_true", help="Only report what the edit would do.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier edit in the same folder.")
    parser.add_argument("--layers_json", type=str, help='A rho for each layer: {"31": {"gate": 0.8, "up": 0.8}}.')
    parser.add_argument("--layers_file", type=str, help="The same from a file.")
    parser.add_class_arguments(EditConfig)


def run(options: Namespace) -> dict[str, Any]:
    """Edits and writes; returns what was done to each layer."""
    writes = options.save != "none" and not options.dry_run
    apply = _apply_patch if options.patch else _apply_edit
    if not writes:
        return apply(options, None)[1]
    with output_folder(options, "apply") as output:
        name, done = apply(options, output)
    _say_what_next(output.path, options, name)
    return done


def _apply_edit(options: Namespace, output: OutputFolder | None) -> Applied:
    """Edits with factors."""
    factors = open_factors(options)
    model_source = named_model(options, factors.metadata, factors.path)
    name = str(model_source)
    config = _config(options)
    if output:
        read = {"the model": model_source, "the factors": factors.path, **(options.domains or {})}
        check_not_within(output.path, read)
        if options.save == "full":
            room_for_checkpoint(output, model_source)
    rule = "a rho for each layer" if config.layers else f"formula {config.formula}, rho {config.rho:g}"
    console.print(f"edit {name} with the factors in {factors.path} ({rule})")
    tokenizer = model_tokenizer(model_source) if output else None
    if tokenizer is not None:
        note_other_tokenizer(factors, tokenizer_fingerprint(tokenizer))
    model = open_model(model_source, options)
    editor = KFACEditor(model, factors, config, **editor_options(options))
    if output and options.save == "full":
        free_space_for(output.path, sum(p.numel() for p in model.parameters()) * stored_dtype(model).itemsize)
    before = weights_fingerprint(model, editor.layers)
    report = editor.apply(dry_run=options.dry_run)
    show(report_table(report, "What the edit would do" if options.dry_run else "What the edit did"), LEGEND)
    if options.dry_run:
        _say_price(editor)
    if report.forced:
        console.print("The factors belong to other weights or tokens; the edit was forced, and edit.json says so.")
    if output is not None:
        metadata = {key: value for key, value in factors.metadata.items() if key != "layers"}
        about: dict[str, Any] = {"source": model_source, "factors": metadata, "fingerprint": before}
        save_edited(model, tokenizer, output.new, report, **about, save=options.save)
    return name, report.to_dict()


def _say_price(editor: KFACEditor) -> None:
    """The diagonal form, where the curvature of single components was measured."""
    measured = editor.collected() & {"moments", "coupled"}
    if measured:
        price = sum(editor.diagonal_price(name, dW) for name, dW in editor.changes()[1].items())
        what = "moments" if "moments" in measured else "coupled factors"
        console.print(f"it will cost about {price:+.4f} nats a token to second order, by the {what} (see forecast)")


def _apply_patch(options: Namespace, output: OutputFolder | None) -> Applied:
    """Applies a patch."""
    if options.factors:
        raise InputError("give either --factors or --patch")
    if options.save == "patch":
        raise InputError("--patch makes a checkpoint of a patch: --save patch has no meaning there")
    if options.dry_run or options.domains:
        raise InputError("--patch applies an edit as it was made: leave --dry-run and --domains out")
    model_source = named_model(options, patch_source(options.patch), options.patch)
    name = str(model_source)
    if output:
        check_not_within(output.path, {"the model": model_source, "the patch": options.patch})
        room_for_checkpoint(output, model_source)
    console.print(f"apply the patch {options.patch} to {name}")
    tokenizer = model_tokenizer(model_source) if output else None
    model = open_model(model_source, options)
    details = apply_patch(model, options.patch, options.force)
    layers = details.get("layers", [])
    have = "1 layer now has" if len(layers) == 1 else f"{len(layers):,} layers now have"
    console.print(f"{have} the weights of the patch")
    if output:
        about = {key: value for key, value in details.items() if key != "patch"}  # it is a checkpoint now
        extra = {EDIT_FILE: json.dumps(details, indent=2), CARD: model_card(about)}
        changed = [layer["name"] for layer in details.get("layers", [])]
        save_checkpoint(model, tokenizer, output.new, extra=extra, source=model_source, changed=changed)
    return name, details


def _say_what_next(output: Path, options: Namespace, name: str) -> None:
    save = options.save
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    console.print(f"{save} -> {output}/ ({size / 1e6:,.1f} MB)")
    if save == "patch":
        show_next("the model with it", "apply", "--model", name, "--patch", output, "--output", f"{output}-applied")
    else:
        after_edit(Path(options.factors or options.patch), output, name)


def _config(options: Namespace) -> EditConfig:
    """EditConfig from its flat options and the two forms of the original tool."""
    settings = {name: options[name] for name in EditConfig.__dataclass_fields__}
    given = [name for name in ("layers_json", "layers_file") if options[name]]
    if len(given) + (settings["layers"] is not None) > 1:
        raise InputError("give only one of --layers, --layers-json and --layers-file")
    if given:
        settings["layers"] = _parse_layers(options[given[0]], is_file=given[0] == "layers_file")
    return EditConfig(**settings)


def _parse_layers(text: str, is_file: bool) -> dict[str, Any]:
    where = text if is_file else "--layers-json"
    try:
        layers = json.loads(Path(text).read_text("utf-8") if is_file else text)
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    return layers
