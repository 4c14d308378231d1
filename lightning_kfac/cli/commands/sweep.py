"""Try many edits of one model, and show which are worth it: a table, the Pareto front, a figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.measured import MeasuredPoints
from lightning_kfac.cli.next_steps import show_page
from lightning_kfac.cli.options import (
    NOT_MEASURED,
    add_editing_options,
    add_model_options,
    base_config,
    editor_options,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
)
from lightning_kfac.cli.tasks import IMAGES
from lightning_kfac.console import console, counted, visible
from lightning_kfac.editing import sweep
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.formulas import FormulaName
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.image_evaluator import ImageEvaluator
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.reporting.figures.image_sweep import image_sweep_figure
from lightning_kfac.reporting.figures.pareto import pareto_figure
from lightning_kfac.reporting.labels import DRAWN
from lightning_kfac.reporting.tables import show_sweep, sweep_table
from lightning_kfac.storage.files import new_file, writing
from lightning_kfac.storage.manifest import remove_ours
from lightning_kfac.storage.run_folder import CONFIG, EVENTS, RESULTS, STATUS

NOTED = True
OUTPUTS = (RESULTS, "pareto.png", EVENTS, CONFIG, STATUS)
FIGURES = RESULTS
SETS_OF_BLOCKS = list[list[int] | Literal["all"]] | int | str | None
SETS_OF_PROJECTIONS = list[list[str]] | str | None
# Of the grid, or of no use in it.
GRID = {"rho", "formula", "blocks", "projections", "layers", "alpha", "seed"}


class Goal(NamedTuple):
    """What an edit should suppress, and what it costs.

    Attributes:
        key, name, short: Of the figure to suppress.
        cost, cost_name: Of the figure that an edit costs.
        sign: -1 where that is better when it is higher.
        figure: Draws one against the other.
    """

    key: str = "strict_acc"
    name: str = "strict accuracy"
    short: str = "strict"
    cost: str = "perplexity"
    cost_name: str = "perplexity"
    sign: int = 1
    figure: Callable[[Sequence[Mapping[str, Any]], str], Figure] = pareto_figure

    def signed(self, row: Mapping[str, Any]) -> float | None:
        """What an edit costs: less is better; None where it was not measured."""
        value = row.get(self.cost)
        return None if value is None else self.sign * float(value)

    def cost_of(self, row: Mapping[str, Any]) -> float:
        """The same, for sorting; what was not measured comes last."""
        cost = self.signed(row)
        return math.inf if cost is None else cost


OF_IMAGES = Goal(
    "wrong_label_acc", "share of wrong labels", "a share of", "val_acc", "validation accuracy", -1, image_sweep_figure
)


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    add_editing_options(parser)
    parser.add_argument("--output", type=str, default="runs/sweep", help="Folder of results, figure and TensorBoard.")
    parser.add_argument("--formulas", type=list[FormulaName], default=["original"], help="Formulas to try.")
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
    parser.add_argument("--blocks", type=SETS_OF_BLOCKS, help="Blocks, such as 3,4; or sets to try: [[3, 4], [3]].")
    parser.add_argument("--projections", type=SETS_OF_PROJECTIONS, help="The same: gate,up or [[gate, up], [up]].")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="For the formula random.")
    parser.add_argument(
        "--target",
        type=float,
        default=0.1,
        help="Strict accuracy (of images the share of wrong labels) to reach: the weakest edit that does is shown.",
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to evaluate: auto, cpu, gpu.")
    parser.add_class_arguments(EditConfig, skip=GRID)
    parser.add_class_arguments(TextData, "data", skip=NOT_MEASURED)


def run(options: Namespace) -> None:
    """Evaluates every point that is not in the folder yet; then shows all of them."""
    factors = open_factors(options)
    model_source = named_model(options, factors.metadata, factors.path)
    name = str(model_source)
    folder = Path(options.output)
    keywords = editor_options(options)
    base = base_config(options, options.formulas, GRID)
    configs = sweep.grid(
        base,
        formulas=options.formulas,
        rhos=options.rhos,
        alphas=options.alphas,
        blocks=_sets(options.blocks),
        projections=_sets(options.projections),
        seeds=options.seeds,
        mixing=bool(keywords["domains"]),
    )
    images = factors.metadata.get("task") == IMAGES
    evaluator = _evaluator(options, factors, model_source, folder)
    note_other_tokenizer(factors, evaluator.data.tokenizer_fingerprint)
    model = open_model(model_source, options)
    editor = KFACEditor(model, factors, base, repeated=True, **keywords)
    for config in configs:
        editor.check(config)
    points = MeasuredPoints(editor, evaluator, folder / RESULTS, factors, keywords["domains"], options)
    keys = [points.key(config) for config in configs]
    done = sum(key in points.rows for key in keys)
    many = counted(len(configs), "edit")
    console.print(
        f"{folder}: {many} of {name} with the factors in {factors.path}, {done} of them measured before; "
        f"measure {', '.join(evaluator.data.validation_names)}"
    )
    points.measure(configs, "sweep")
    rows = [points.rows[points.baseline], *(points.rows[key] for key in dict.fromkeys(keys))]
    _show(rows, folder, name, options.target, OF_IMAGES if images else Goal())


def _evaluator(
    options: Namespace, factors: FactorFolder, model: ModelSource, folder: Path
) -> ModelEvaluator | ImageEvaluator:
    """What measures an edit: on the texts that are named, or on the images of the collection."""
    if factors.metadata.get("task") == IMAGES:
        return ImageEvaluator(model, factors.metadata["images"], folder, options.accelerator)
    data = TextData(**options.data.as_dict())
    return ModelEvaluator(model, options.dtype, data, folder, options.accelerator)


def _show_at_equal_share(
    unedited: list[dict[str, Any]],
    edits: list[dict[str, Any]],
    reached: Sequence[Mapping[str, Any]],
    goal: Goal,
) -> None:
    """The kinds once more, at the number of components that the cheapest that suppresses keeps."""
    console.print("rho is a share of another importance for each formula: compare at equal forgetting, as above, or")
    share = (reached or edits)[0]["edit"]["fraction_kept"]
    title = f"Of each kind the edit that keeps nearest to {share:.1%} of the components, by {goal.cost_name}"
    show_sweep(sweep_table([*unedited, *sorted(sweep.at_equal_share(edits, share), key=goal.cost_of)], title))


def _show(rows: list[dict[str, Any]], folder: Path, name: str, target: float, goal: Goal) -> None:
    """Table, front, weakest settings, figure and TensorBoard."""
    merged = sweep.average_seeds(rows)
    merged.sort(key=lambda row: (row["edit"] is not None, row.get(goal.key) or 0.0, goal.cost_of(row)))
    edits = [row for row in merged if row["edit"]]
    costs = [{goal.key: row.get(goal.key), goal.cost: goal.signed(row)} for row in edits]
    front = [number + len(merged) - len(edits) for number in sweep.pareto_front(costs, goal.key, goal.cost)]
    show_sweep(sweep_table(merged, f"All edits of {name}, by {goal.name}", front))
    if any(row.get(goal.key) is not None for row in edits):
        reached = sorted(sweep.weakest_settings(edits, target, goal.key, goal.cost), key=goal.cost_of)
        title = f"Of each kind the weakest edit with {goal.name} {target:g} or less, by {goal.cost_name}"
        if reached:
            show_sweep(sweep_table([*merged[:1], *reached], title))
        else:
            console.print(f"No edit reaches {goal.short} {target:g}.")
        if len({row["edit"]["formula"] for row in edits}) > 1:
            _show_at_equal_share(merged[:1], edits, reached, goal)
    figure = goal.figure(merged, f"{name}: what each edit costs, and what it suppresses")
    with new_file(folder / "pareto.png") as partial:
        figure.savefig(partial, format="png", dpi=150)
    with writing(folder / EVENTS):
        _to_tensorboard(edits, figure, folder / EVENTS)
    console.print(f"results, pareto.png and tensorboard/ are in {folder}/")
    show_page(folder)


def _sets(given: Any) -> list[Any] | None:
    """Sets to try: what is no list is one."""
    return given if given is None or isinstance(given, list) else [given]


def _folder_name(label: str) -> str:
    """A label, which may hold names of domains, as the name of one folder."""
    return visible(label).replace("/", "_")


def _to_tensorboard(edits: list[dict[str, Any]], figure: Figure, board: Path) -> None:
    """The figure, and one run for each kind of edit, so that TensorBoard draws them in one chart."""
    remove_ours(board)  # all of it is written again each time
    with SummaryWriter(str(board)) as writer:
        writer.add_figure("sweep/pareto", figure)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(edits, key=lambda row: row["edit"]["rho"]):
        kinds.setdefault(f"{edit_label(row['edit'])}, {edit_place(row['edit'])}", []).append(row)
    for label, rows in kinds.items():
        with SummaryWriter(str(board / _folder_name(label))) as writer:
            for row in rows:
                for key in DRAWN:
                    if row.get(key) is not None:
                        writer.add_scalar(f"{key} by 1000 rho", row[key], round(1000 * row["edit"]["rho"]))
                settings = {key: row["edit"][key] for key in ("formula", "rho", "mode", "fraction_kept")}
                settings |= {"where": edit_place(row["edit"]), "kind": visible(label)}
                figures = {f"hp/{key}": row[key] for key in DRAWN if row.get(key) is not None}
                writer.add_hparams(settings, figures, run_name=f"rho {row['edit']['rho']:g}", global_step=0)
