"""RunReport: results.jsonl, the table of before and after, and example continuations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_kfac.callbacks.edit import EditCallback
from lightning_kfac.callbacks.reported import Reported, reported, reported_data
from lightning_kfac.callbacks.typed import find_callback
from lightning_kfac.console import say, show, visible
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.editing.edited_model import edit_details
from lightning_kfac.editing.model_card import write_card
from lightning_kfac.metrics.extraction import CURVE
from lightning_kfac.metrics.loss_change import EDGES
from lightning_kfac.models.source import origin
from lightning_kfac.modules.text_data import text_data
from lightning_kfac.reporting.board import Board
from lightning_kfac.reporting.figures.comparison import extraction_figure, loss_change_figure, metrics_figure
from lightning_kfac.reporting.labels import INTERVALS, METRICS, is_drawn, legend, measured_leaks, stage_label
from lightning_kfac.reporting.tables import (
    BOLD,
    Example,
    comparison_table,
    examples_markdown,
    examples_table,
    leaks_table,
)
from lightning_kfac.storage.files import new_file
from lightning_kfac.storage.run_folder import EDIT_FILE, RunFolder

EXAMPLES = 3
COMPARISON = "comparison.json"
EXTRACTION = "extraction.json"


class RunReport(Callback):
    """Opens the run's folder, records every evaluation, and shows at the end what changed.

    Args:
        folder: The run's folder.
        command, config: For the folder: the command line and the full config.
        resumed: This goes on with an interrupted run.
    """

    def __init__(self, folder: RunFolder, command: str, config: str, resumed: bool = False):
        self.folder = folder
        self.command = command
        self.config = config
        self.resumed = resumed
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.continuations: dict[str, dict[int, list[int]]] = {}
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.rows: list[dict[str, Any]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Data and model are loaded and good: only now may an earlier run be put aside."""
        if trainer.is_global_zero:
            begin = self.folder.resume if self.resumed else self.folder.begin
            begin(self.command, self.config)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        module = reported(pl_module)
        stage = module.stage
        name, _, rank = stage.partition(" ")  # `lowrank 4`
        if not rank:  # ranks have a table of their own
            self.evaluations[stage] = module.record
        if (latest := module.evaluation) is not None:
            for set_name, curve in ({} if rank else latest.curves).items():
                self.curves.setdefault(set_name, {})[stage] = curve
            self.continuations[stage] = latest.continuations.get(MEMORIZED, {})
        if trainer.is_global_zero:
            row = {"stage": name, **({"rank": int(rank)} if rank else {}), **module.record}
            row |= {"edit": _edit_row(trainer, module), "measured": _measured(trainer, module)}
            made_by = {"tokenizer_fingerprint": reported_data(trainer).tokenizer_fingerprint}
            self.rows.append(row | origin(module.evaluated) | made_by)
            self.folder.add_result(self.rows[-1])

    def show_extraction(self, trainer: Trainer) -> None:
        """The share that samples extract over their number: in loggers, and for a report in ``extraction.json``."""
        if not self.curves:
            return
        with new_file(self.folder.path / EXTRACTION) as partial:
            partial.write_text(json.dumps({"tries": CURVE, "curves": self.curves}) + "\n", "utf-8")
        board = Board(trainer.loggers)
        if board.takes_pictures:
            board.figure("comparison/extraction by sampling", extraction_figure(CURVE, self.curves, self.evaluations))

    def show_comparison(self, trainer: Trainer) -> None:
        """Prints all evaluations side by side, and shows them in loggers."""
        table = comparison_table(self.evaluations)
        words = [*legend(self.evaluations.values()), f"in brackets: {INTERVALS}"]
        board = Board(trainer.loggers)
        if table.row_count:
            show(table, words)
            board.table("before and after" if len(self.evaluations) > 1 else "results", table, words)
        if len(self.evaluations) > 1:
            board.before_and_after(self.evaluations)
        if measured_leaks(self.evaluations.values()):
            show(leaks_table(self.evaluations))
        for stage, record in self.evaluations.items():
            if near := sum(value for key, value in record.items() if key.endswith("n_near_ties")):
                verdicts = "1 verdict hangs" if near == 1 else f"{near:,} verdicts hang"
                say(f"{stage_label(stage)}: {verdicts} on logits that are equal within the model's precision")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.evaluations:
            self.show_comparison(trainer)
        module = reported(pl_module)
        examples: list[Example] = []
        stages = list(self.continuations)
        if stages[-1:] != ["baseline"] and self.continuations.get("baseline") and self.continuations[stages[-1]]:
            examples = self._examples(trainer)
            show(examples_table(examples, stage_label(stages[-1])), [BOLD])
        self._show_change(trainer, module, examples)
        self._complete_cards()
        self.show_extraction(trainer)
        self._log_hyperparameters(trainer, module)

    def _show_change(self, trainer: Trainer, module: Reported, examples: list[Example]) -> None:
        """Figures and examples in loggers, and what a report needs of them in ``comparison.json``."""
        counts = None if module.evaluation is None else module.evaluation.change_counts
        if len(self.evaluations) > 1:
            details = {"examples": [e._asdict() for e in examples], "edges": EDGES.tolist(), "loss_change": counts}
            with new_file(self.folder.path / COMPARISON) as partial:
                partial.write_text(json.dumps(details, indent=1) + "\n", "utf-8")
        board = Board(trainer.loggers)
        if not board.takes_pictures or len(self.evaluations) < 2:
            return
        if is_drawn(self.evaluations.values()):
            board.figure("comparison/metrics", metrics_figure(self.evaluations))
        if counts:
            board.figure("comparison/loss of held-out tokens", loss_change_figure(EDGES.tolist(), counts))
        if examples:
            last = stage_label(list(self.evaluations)[-1])
            board.text("continuations", examples_markdown(examples, last), trainer.global_step)

    def _complete_cards(self) -> None:
        """The model cards of what this run saved, with what was measured since."""
        stages = list(self.evaluations.values())
        for name in ("edited", "patch"):
            if len(stages) > 1 and (self.folder.path / name / EDIT_FILE).is_file():
                write_card(self.folder.path / name, self.evaluations.get("baseline"), stages[-1])

    def _examples(self, trainer: Trainer) -> list[Example]:
        """Sequences that this rank decoded before and after; first those that the edit changed."""
        before = self.continuations["baseline"]
        after = list(self.continuations.values())[-1]
        data = text_data(trainer)
        sequences = data.sequences(MEMORIZED)
        changed = [i for i in sorted(after) if before.get(i) == list(sequences[i].suffix) != after[i]]
        rest = [i for i in sorted(after) if i not in changed]
        return [_example(data.decode, sequences[i], before[i], after[i]) for i in [*changed, *rest][:EXAMPLES]]

    def _log_hyperparameters(self, trainer: Trainer, module: Reported) -> None:
        if not self.evaluations:
            return
        edit = _edit_row(trainer, module) or {}
        settings = {
            **{key: visible(value) for key, value in origin(module.source).items() if value is not None},
            "labels": module.labels,
            **reported_data(trainer).hyperparameters(),
            "seed": module.seed,
            **{
                f"edit/{key}": value if isinstance(value, float) else visible(value)
                for key, value in edit.items()
                if value
            },
        }
        last = list(self.evaluations.values())[-1]
        metrics = _shown_figures(last)
        known = {key: value for key, value in settings.items() if value is not None}
        board = Board(trainer.loggers)
        board.hyperparameters(known, metrics)
        names = {stage: stage_label(stage) for stage in self.evaluations} if len(self.evaluations) > 1 else {}
        of_edit = [key for key in known if key.startswith("edit/")]
        plain = {key: value for key, value in known.items() if key not in of_edit}
        board.compared(
            {name: {**(plain if stage == "baseline" else known), "which": name} for stage, name in names.items()},
            {name: _shown_figures(self.evaluations[stage]) for stage, name in names.items()},
        )


def _shown_figures(record: dict[str, Any]) -> dict[str, float]:
    """Of one model, as TensorBoard's comparison of runs names them."""
    return {f"hp/{key}": record[key] for key in METRICS if record.get(key) is not None}


def _measured(trainer: Trainer, module: Reported) -> dict[str, Any]:
    """What a figure depends on beside the model."""
    dtype = str(next(module.loaded.parameters()).dtype).removeprefix("torch.")
    measures = {} if module.measures is None else asdict(module.measures)
    about = {"dtype": dtype, "precision": trainer.precision, **measures}
    return {**reported_data(trainer).described(), **about, "reference": module.baseline_name}


def _example(
    decode: Callable[[Sequence[int]], str], sequence: MemorizedSequence, before: list[int], after: list[int]
) -> Example:
    gold = list(sequence.suffix)
    same = next((i for i, (a, b) in enumerate(zip(after, gold, strict=False)) if a != b), len(after))
    start, whole = decode(after[:same]), decode(after)
    diverging = whole[len(start) :] if whole.startswith(start) else decode(after[same:])
    return Example(decode(sequence.prefix), decode(gold), decode(before), whole, diverging)


def _edit_row(trainer: Trainer, module: Reported) -> dict[str, Any] | None:
    """The field ``edit`` of a result: what this run did, or what was done to the checkpoint it measures."""
    edit = find_callback(trainer, EditCallback)
    if edit is not None and module.stage in edit.reports:
        return edit.reports[module.stage].summary()
    return edit_details(module.evaluated).get("summary")
