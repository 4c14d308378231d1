"""Edit one block and one projection at a time: which carry the recitation? Then recommend a setting."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.advice import apply_words, cost_in_words, show_advice
from lightning_kfac.cli.measured import MeasuredPoints
from lightning_kfac.cli.next_steps import show_page
from lightning_kfac.cli.options import (
    NOT_SCANNED,
    add_editing_options,
    add_model_options,
    editor_options,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
)
from lightning_kfac.console import command_line, console, counted, show
from lightning_kfac.data.set_formats import MemorizedSet
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.scan import candidates, places, recommended, single_edits
from lightning_kfac.errors import InputError
from lightning_kfac.math.selection import check_rho
from lightning_kfac.models.targets import block_of, projection_of
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.reporting.figures.scan import scan_figure, scan_values
from lightning_kfac.reporting.labels import legend
from lightning_kfac.reporting.tables import comparison_table, show_sweep, sweep_table
from lightning_kfac.storage.files import new_file, writing
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.run_folder import CONFIG, EVENTS, RESULTS, STATUS

NOTED = True
OUTPUTS = (RESULTS, "reported.jsonl", "recommended.json", "halves", "scan.png", EVENTS, CONFIG, STATUS)
Result = dict[str, Any]
RESULT = "recommended.json"
FIGURES = RESULT


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    add_editing_options(parser)
    parser.add_argument("--output", type=str, default="runs/scan", help="Folder of results, figure and TensorBoard.")
    parser.add_argument("--rho", type=float, default=0.6, help="Of the edits of one block or projection alone.")
    parser.add_argument("--rhos", type=list[float], default=[0.6, 0.7, 0.8, 0.9], help="To try for the recommendation.")
    parser.add_argument("--widest", type=int, default=3, help="Most neighbouring blocks of the recommendation.")
    parser.add_argument("--target", type=float, default=0.1, help="Strict accuracy that the recommendation must reach.")
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to evaluate: auto, cpu, gpu.")
    parser.add_class_arguments(TextData, "data", skip=NOT_SCANNED)


def run(options: Namespace) -> None:
    """Scans, recommends on one half of the memorized set, and reports on the other."""
    for rho in (options.rho, *options.rhos):
        check_rho(rho)
    if not options.rhos or options.widest < 1:
        raise InputError("--rhos must name at least one rho, and --widest must be at least 1")
    factors = open_factors(options)
    model_source = named_model(options, factors.metadata, factors.path)
    name = str(model_source)
    folder = Path(options.output)
    keywords = editor_options(options)
    settings = options.data.as_dict()
    if not (settings.get("memorized") and settings.get("heldout")):
        raise InputError("a scan measures recitation and perplexity: set data.memorized and data.heldout")
    layers = places(factors)
    if unknown := sorted(set(factors) - set(_known(factors))):
        console.print(f"not scanned, because their block or projection has no name that we know: {', '.join(unknown)}")
    if not layers:
        raise InputError(f"{factors.path}: none of its layers has a block and a projection that we know by name")
    halves = _halves(MemorizedSet.parse("memorized", settings["memorized"]), folder)
    evaluators = [
        ModelEvaluator(
            model_source, options.dtype, TextData(**settings | {"memorized": half}), folder, options.accelerator
        )
        for half in halves
    ]
    note_other_tokenizer(factors, evaluators[0].data.tokenizer_fingerprint)
    base = EditConfig(rho=options.rho)
    editor = KFACEditor(open_model(model_source, options), factors, base, repeated=True, **keywords)
    edits = single_edits(layers, base)
    many = counted(len(edits), "edit")
    console.print(f"{folder}: {many} of one block or projection of {name}; every second sequence chooses")
    choosing, reporting = (
        MeasuredPoints(editor, evaluator, folder / file, factors, keywords["domains"], options)
        for evaluator, file in zip(evaluators, ("results.jsonl", "reported.jsonl"), strict=True)
    )
    before, *rows = choosing.measure(edits, "scan")
    _show_scan(before, rows, folder, name, options.rho)
    if before["strict_acc"] <= options.target:
        console.print(
            f"The unedited model's strict accuracy is {before['strict_acc']:.3f} already: nothing to recommend."
        )
        return
    whole = {row["edit"]["blocks"][0]: row for row, edit in zip(rows, edits, strict=True) if _is_whole(edit, layers)}
    tried = candidates(whole, before, layers, base, options.rhos, options.widest)
    _, *found = choosing.measure(tried, "try settings")
    number = recommended(found, options.target)
    if number is None:
        best = min(found, key=lambda row: row["strict_acc"])["strict_acc"]
        console.print(f"No setting that was tried reaches strict {options.target:g}; the least is {best:.3f}.")
        return
    edit = found[number]["edit"]
    _draw(before, rows, folder, name, options.rho, (edit["blocks"], edit["projections"]))
    _show_recommendation(found[number], reporting.measure([tried[number]], "report"), options)


def _known(names: Iterable[str]) -> list[str]:
    return [name for name in names if block_of(name) is not None and projection_of(name) is not None]


def _is_whole(edit: EditConfig, layers: dict[int, list[str]]) -> bool:
    return any(edit.blocks == [block] and edit.projections == names for block, names in layers.items())


def _halves(memorized: MemorizedSet, folder: Path) -> list[dict[str, Any]]:
    """Every second row apart, as two files in the folder that are read like the set."""
    place = folder / "halves"
    paths: list[Path] = []
    file = memorized.files()[0]
    if file.resolve().is_relative_to(place.resolve()):
        raise InputError(f"data.memorized {file} is a half that this scan would write; name the whole set")
    rows = [row for _, row in memorized.rows()]
    if len(rows) < 2:
        raise InputError(f"{file}: a scan needs at least two sequences, one to choose and one to report")
    place.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("choose.jsonl", "report.jsonl")):
        paths.append(place / name)
        with new_file(paths[-1]) as partial:
            partial.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows[number::2]), "utf-8")
    return [asdict(replace(memorized, source=str(path))) for path in paths]


def _show_scan(before: Result, rows: list[Result], folder: Path, name: str, rho: float) -> None:
    show_sweep(sweep_table([before, *rows], f"{name}: each block, and each projection alone, at rho {rho:g}"))
    _draw(before, rows, folder, name, rho)


def _draw(
    before: Result,
    rows: list[Result],
    folder: Path,
    name: str,
    rho: float,
    chosen: tuple[list[int], list[str]] | None = None,
) -> None:
    """The figure as PNG and in TensorBoard; once more, with a frame, when something is recommended."""
    found = scan_values([before, *rows])
    if found is None:
        return
    title = f"{name}: one place edited alone, rho {rho:g} (unedited: strict {before['strict_acc']:.2f})"
    figure = scan_figure(*found, title, chosen)
    with new_file(folder / "scan.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
    with writing(folder / EVENTS), SummaryWriter(str(folder / EVENTS)) as writer:
        writer.add_figure("scan/blocks and projections", figure)


def _show_recommendation(chosen: Result, reported: list[Result], settings: Namespace) -> None:
    folder = Path(settings.output)
    target = settings.target
    edit = chosen["edit"]
    setting = {"blocks": edit["blocks"], "projections": edit["projections"], "rho": edit["rho"]}
    found = {**setting, "target": target, "choosing": chosen, "reporting": reported}
    write_json(folder / RESULT, found, checksum=False)
    options = f"--blocks '{edit['blocks']}' --projections '[{', '.join(edit['projections'])}]' --rho {edit['rho']:g}"
    console.print(
        f"Recommended: {options}, the cheapest setting tried that brings strict accuracy to {target:g} or less "
        f"on the half that chose ({chosen['strict_acc']:.3f}). On the other half (the held-out text is the same):"
    )
    show(comparison_table(dict(zip(("baseline", "edited"), reported, strict=True))), legend(reported))
    console.print(f"scan.png, {RESULT}, results and tensorboard/ are in {folder}/")
    show_page(folder)
    words = apply_words(edit, settings.factors, settings.model, f"{str(folder).removesuffix('-scan')}-edited")
    show_advice(command_line("apply", *words), cost_in_words(*reported))
