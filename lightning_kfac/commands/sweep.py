"""Try many edits of one model, and show which are worth it: a table, the Pareto front, a figure."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.commands.common import (
    add_editing_options,
    add_model_options,
    editor_options,
    model_name,
    open_factors,
    open_model,
)
from lightning_kfac.data.datamodule import TextData
from lightning_kfac.editing import sweep
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.editor import KFACEditor
from lightning_kfac.errors import InputError
from lightning_kfac.evaluator import ModelEvaluator
from lightning_kfac.figures.pareto import pareto_figure
from lightning_kfac.fingerprint import weights_fingerprint
from lightning_kfac.math.importance import Formula
from lightning_kfac.progress import console, progress_console, show, track_count
from lightning_kfac.results import append_result, read_results
from lightning_kfac.tables import sweep_table
from lightning_kfac.targets import Blocks

# Of the grid, or of no use in it.
GRID = {"rho", "formula", "blocks", "projections", "layers", "alpha", "seed"}
NOT_MEASURED = {"corpus", "max_tokens", "planted", "exposures", "shuffle", "domains", "domain_tokens"}


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    add_editing_options(parser)
    parser.add_argument("--output", type=str, default="runs/sweep", help="Folder of results, figure and TensorBoard.")
    parser.add_argument("--formulas", type=list[Formula], default=["original"], help="Formulas to try.")
    parser.add_argument(
        "--rhos",
        type=list[float] | dict[str, list[float]],
        default=[0.5, 0.6, 0.7, 0.8, 0.9],
        help="Shares of the curvature mass to try, for all formulas or for each by name.",
    )
    parser.add_argument(
        "--alphas",
        type=list[float | dict[str, float]],
        default=[1.0],
        help="Weights of the domains to try; each a number, or a number for each domain by name.",
    )
    parser.add_argument("--blocks", type=list[Blocks] | None, help="Sets of blocks to try, such as [[3, 4], [3]].")
    parser.add_argument("--projections", type=list[list[str]] | None, help="Sets of projections, such as [[gate, up]].")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="For the formula random.")
    parser.add_argument(
        "--target", type=float, default=0.1, help="Strict accuracy to reach: the weakest edit that does is shown."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to evaluate: auto, cpu, gpu.")
    parser.add_class_arguments(EditConfig, skip=GRID)
    parser.add_class_arguments(TextData, "data", skip=NOT_MEASURED)


def run(options: Namespace) -> None:
    """Evaluates every point that is not in the folder yet; then shows all of them."""
    factors = open_factors(options)
    name, folder = model_name(options, factors), Path(options.output)
    keywords = editor_options(options)
    base = EditConfig(**{key: options[key] for key in EditConfig.__dataclass_fields__ if key not in GRID})
    configs = sweep.grid(
        base,
        formulas=options.formulas,
        rhos=options.rhos,
        alphas=options.alphas,
        blocks=options.blocks,
        projections=options.projections,
        seeds=options.seeds,
        mixing=bool(keywords["domains"]),
    )
    data = TextData(**options.data.as_dict())
    evaluator = ModelEvaluator(name, options.dtype, data, folder, options.accelerator)
    model = open_model(name, options)
    editor = KFACEditor(model, factors, base, repeated=True, **keywords)
    for config in configs:
        editor.check(config)
    # Everything that a figure depends on, but for the device.
    read = {name: folder.content() for name, folder in {"": factors, **keywords["domains"]}.items()}
    weights = weights_fingerprint(model, factors)
    context = weights, sorted(read.items()), data.measured(), options.dtype, options.precision
    points = {sweep.point_key(config, *context): config for config in configs}
    results = folder / "results.jsonl"
    known = {row.get("point"): row for row in read_results(results)}
    if None in known:
        raise InputError(f"{results} holds results of something else; choose another --output")
    missing = {key: config for key, config in points.items() if key not in known}
    baseline = sweep.point_key(EditConfig(), "baseline", *context)
    console.print(
        f"{folder}: {len(points)} edits of {name} with the factors in {factors.path}, {len(points) - len(missing)} of "
        f"them measured before; measure {', '.join(data.validation_names)}"
    )
    if missing or baseline not in known:
        for row in _measure(editor, evaluator, missing, baseline):
            known[row["point"]] = append_result(results, row | {"model": name})
    _show([known[baseline], *(known[key] for key in points)], folder, name, options.target)


def _measure(
    editor: KFACEditor, evaluator: ModelEvaluator, missing: dict[str, EditConfig], baseline: str
) -> Iterator[dict[str, Any]]:
    """The unedited model, which nDCG needs, and every missing point."""
    yield {"stage": "baseline", "edit": None, "point": baseline, **evaluator(editor.model)}
    evaluator.module.stage = "edited"
    evaluating = 0.0

    def evaluate(model) -> dict[str, Any]:
        nonlocal evaluating
        begin = time.monotonic()
        figures = evaluator(model)
        evaluating += time.monotonic() - begin
        return figures

    begin = time.monotonic()
    with track_count("sweep", "edits", total=len(missing)) as advance_to:
        rows = sweep.run(editor, missing.values(), evaluate)
        for number, (key, row) in enumerate(zip(missing, rows, strict=True), start=1):
            yield {"stage": "edited", "point": key, **row}
            advance_to(number)
    total = time.monotonic() - begin
    progress_console.print(f"{len(missing)} edits: {total - evaluating:.1f} s editing, {evaluating:.1f} s measuring")


def _show(rows: list[dict], folder: Path, name: str, target: float) -> None:
    """Table, front, weakest settings, figure and TensorBoard."""
    merged = sweep.average_seeds(rows)
    merged.sort(key=lambda row: (row["edit"] is not None, row.get("strict_acc") or 0.0, row.get("perplexity") or 0.0))
    edits = [row for row in merged if row["edit"]]
    front = [number + len(merged) - len(edits) for number in sweep.pareto_front(edits)]
    show(sweep_table(merged, f"All edits of {name}, by strict accuracy", front))
    if any(row.get("strict_acc") is not None for row in edits):
        reached = sweep.weakest_settings(edits, target)
        title = f"Of each kind the weakest edit with strict accuracy {target:g} or less, by perplexity"
        show(sweep_table([*merged[:1], *reached], title) if reached else f"No edit reaches strict {target:g}.")
    figure = pareto_figure(merged, f"{name}: what each edit costs, and what it suppresses")
    figure.savefig(folder / "pareto.png", dpi=150)
    _to_tensorboard(edits, figure, folder / "tensorboard")
    console.print(f"results, pareto.png and tensorboard/ are in {folder}/")


def _to_tensorboard(edits: list[dict], figure: Figure, board: Path) -> None:
    """The figure, and one run for each kind of edit, so that TensorBoard draws them in one chart."""
    shutil.rmtree(board, ignore_errors=True)  # all of it is written again each time
    with SummaryWriter(str(board)) as writer:
        writer.add_figure("sweep/pareto", figure)
    kinds: dict[str, list[dict]] = {}
    for row in sorted(edits, key=lambda row: row["edit"]["rho"]):
        kinds.setdefault(f"{edit_label(row['edit'])}, {edit_place(row['edit'])}", []).append(row)
    for label, rows in kinds.items():
        with SummaryWriter(str(board / label)) as writer:
            for row in rows:
                for key in ("strict_acc", "perplexity", "ndcg@10"):
                    if row.get(key) is not None:
                        writer.add_scalar(f"{key} by 1000 rho", row[key], round(1000 * row["edit"]["rho"]))
