"""Attack an edited model: does what it no longer recites come back? A table, and a curve over steps of relearning."""

import itertools
import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.attacks.attack import attacked_layers
from lightning_kfac.attacks.registry import KINDS, attack_of
from lightning_kfac.cli.attacked import AttackedModel, PlannedAttack, Row
from lightning_kfac.cli.learned import in_halves
from lightning_kfac.cli.options import add_model_options, open_model
from lightning_kfac.console import command_line, console, counted, show, track_count, visible
from lightning_kfac.editing.edited_model import edit_details, find_reference
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import load_config
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.reporting.attacks import attacks_table, recovery_curves
from lightning_kfac.reporting.figures.recovery import recovery_figure
from lightning_kfac.storage.files import new_file, writing
from lightning_kfac.storage.manifest import remove_ours
from lightning_kfac.storage.run_folder import CONFIG, EDIT_FILE, EVENTS, RESULTS, STATUS

NOTED = True
HALVES = "halves"
FIGURE = "recovery.png"
OUTPUTS = (RESULTS, HALVES, FIGURE, EVENTS, CONFIG, STATUS)
FIGURES = RESULTS
DEFAULT = [*KINDS]
NOT_ASKED = {"planted", "exposures", "shuffle", "domains", "domain_tokens", "mining"}


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, required=True)
    parser.add_argument("--unedited", type=str, help="The model before the edit; by default the one in edit.json.")
    parser.add_argument("--output", type=str, default="runs/attacks", help="Folder of results, figure and TensorBoard.")
    parser.add_argument(
        "--attacks",
        type=list[str | dict[str, Any]],
        default=DEFAULT,
        help=f"Each by its name ({', '.join(KINDS)}), or a mapping of name and settings (docs/attacks.md).",
    )
    parser.add_argument("--half_seed", type=int, default=0, help="Decides which half of the set attacks may learn.")
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to compute: auto, cpu, gpu.")
    parser.add_class_arguments(TextData, "data", skip=NOT_ASKED)


def run(options: Namespace) -> None:
    """Measures every attack that is not in the folder yet; then shows all of them."""
    attacks = list(dict.fromkeys(map(attack_of, options.attacks)))
    if not attacks:
        raise InputError("--attacks is empty: name at least one")
    edited = _edited(options)
    unedited = _unedited(edited, options)
    folder = Path(options.output)
    settings = options.data.as_dict()
    if not settings.get("memorized"):
        raise InputError("an attack is measured by what the model recites: set data.memorized", "data.memorized")
    halves, data = in_halves(edited, settings, options.half_seed, folder / HALVES)
    evaluator = ModelEvaluator(edited, options.dtype, data, folder, options.accelerator)
    model = open_model(edited, options)
    attacked_layers(model)  # a model that cannot be attacked is refused before the work
    details = edit_details(edited)
    layers = [layer["name"] for layer in details.get("layers", [])]
    before = unedited.about(), None if options.unedited else details.get("fingerprint")
    context = weights_fingerprint(model, layers), before, data.measured(), options.dtype
    measured = AttackedModel(evaluator, folder / RESULTS, context)
    plan = [PlannedAttack.of(attack, halves, data, edited, folder) for attack in attacks]
    abouts = [about for planned in plan for about in planned.abouts]
    missing = [about for about in abouts if not measured.done(about)]
    console.print(
        f"{folder}: {counted(len(abouts), 'attack')} on {edited}, "
        f"{len(abouts) - len(missing)} of them measured before; "
        f"measured on {counted(len(halves.reported), 'sequence')}, which no attack sees"
    )
    if missing:
        measured.measure_pair(lambda: open_model(unedited, options), model, unedited)
        with track_count("attack", "attacks", total=len(missing)) as advance_to:
            done = itertools.count(1)
            for planned in plan:
                planned.run(measured, model, folder, options.accelerator, lambda: advance_to(next(done)))
    _show(measured.shown(abouts), folder, str(edited))


def _show(rows: list[Row], folder: Path, name: str) -> None:
    """Table, figure and TensorBoard."""
    show(attacks_table(rows))
    curves = recovery_curves(rows)
    if not curves:
        return
    figure = recovery_figure(rows, f"{name}: what relearning brings back")
    with new_file(folder / FIGURE) as partial:
        figure.savefig(partial, format="png", dpi=120)
    remove_ours(folder / EVENTS)  # all of it is written again each time
    with writing(folder / EVENTS), SummaryWriter(str(folder / EVENTS)) as writer:
        writer.add_figure("attack/recovery", figure)
        for label, points in curves.items():
            for row in points:
                _log(writer, visible(label), row)
    console.print(f"results, {FIGURE} and tensorboard/ are in {folder}/")


def _log(writer: SummaryWriter, label: str, row: Row) -> None:
    """One point of a curve; without spaces and commas, which TensorBoard replaces in tags."""
    tag = re.sub(r"\W+", "_", label)
    share = row["recovered"]["strict_acc"]
    figures = {"strict_acc": row["got"][0], "perplexity": row.get("perplexity"), "recovered": share and share[0]}
    for figure, value in figures.items():
        if value is not None:
            writer.add_scalar(f"{tag}/{figure}", value, row["attack"]["steps"])


def _edited(options: Namespace) -> ModelSource:
    given = options.revision, options.gguf_file, options.adapter
    return ModelSource.named(options.model, *given, options.trust_remote_code)


def _unedited(edited: ModelSource, options: Namespace) -> ModelSource:
    """The model before the edit, known before anything is loaded."""
    if not options.unedited and not edit_details(edited):
        raise InputError(
            f"{edited}: has no {EDIT_FILE} that names the unedited model; edit one with `{command_line('fit')}` or "
            f"`{command_line('apply')}`, or name it with --unedited"
        )
    vocabulary = load_config(edited).get_text_config().vocab_size
    unedited, why = find_reference(edited, options.unedited, vocabulary)
    if unedited is None:
        raise InputError(f"{edited}: {why}; name the unedited model with --unedited")
    return unedited
