"""Predict what edits will cost on a text, all of them in one pass, before any is made."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lightning_kfac.cli.figures_out import RETURNED
from lightning_kfac.cli.options import (
    add_editing_options,
    add_model_options,
    base_config,
    check_not_within,
    editor_options,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
    output_folder,
)
from lightning_kfac.cli.text_rows import add_row_options, text_rows
from lightning_kfac.collection.shifts import Forecast, forecast
from lightning_kfac.console import console, counted, show, track_count
from lightning_kfac.data.loaders import row_loader
from lightning_kfac.editing import sweep
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.formulas import FormulaName
from lightning_kfac.editing.report import EditReport, edit_label, edit_place
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.scoring import target_losses
from lightning_kfac.math.selection import check_rho
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.reporting.figures.price import price_figure
from lightning_kfac.reporting.run import FORECAST
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.output_folder import OutputFolder

RESULT = FORECAST
FIGURES = RETURNED
# Of the grid, or of no use in it.
GRID = {"rho", "formula", "layers", "alpha", "seed"}
EXPLANATION = (
    "first, second: change of the loss on the text, in nats a token, to first and second order; total: both",
    "diagonal: the second order without any text, from what was collected",
    "of large edits neither is exact: --measure makes them, which costs a forward each",
)


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    add_editing_options(parser)
    parser.add_argument("--text", type=str, default="embedded", help="Held-out text: a corpus, or a memorized set.")
    parser.add_argument("--formulas", type=list[FormulaName], default=["original"], help="Formulas to try.")
    parser.add_argument("--rhos", type=list[float], default=[0.5, 0.6, 0.7, 0.8, 0.9], help="Shares to keep, to try.")
    parser.add_argument("--measure", action="store_true", help="Also make each edit, and measure what it costs.")
    parser.add_argument("--output", type=str, help="Folder of the numbers and a figure; by default only a table.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")
    add_row_options(parser, max_tokens=20_000)
    parser.add_class_arguments(EditConfig, skip=GRID)


def run(options: Namespace) -> dict[str, Any]:
    """Predicts, and shows; returns the figures."""
    if not options.rhos or not options.formulas:
        raise InputError("--rhos and --formulas must each name at least one")
    for rho in options.rhos:
        check_rho(rho)
    if options.output is None:
        return _predict(options, None)
    check_not_within(Path(options.output), {"the factors": options.factors, "the model": options.model})
    with output_folder(options, "forecast") as output:
        found = _predict(options, output)
    console.print(f"{RESULT} and price.png are in {output.path}/")
    return found


def _predict(options: Namespace, output: OutputFolder | None) -> dict[str, Any]:
    factors = open_factors(options)
    source = named_model(options, factors.metadata, factors.path)
    base = base_config(options, options.formulas, GRID)
    configs = sweep.grid(base, formulas=options.formulas, rhos=options.rhos)
    tokenizer = load_tokenizer(source, own_tokenizer=options.data.own_tokenizer)
    note_other_tokenizer(factors, tokenizer_fingerprint(tokenizer))
    model = open_model(source, options)
    editor = KFACEditor(model, factors, base, repeated=True, **editor_options(options))
    for config in configs:
        editor.check(config)
    about: Any = model.config
    with tempfile.TemporaryDirectory() as folder:
        rows = text_rows(options.text, tokenizer, about.get_text_config().vocab_size, options, Path(folder))
    batches = row_loader(rows, options.batch_size, 0, 1)
    edits = [editor.changes(config) for config in configs]
    tokens = counted(len(rows.tokens), "token")
    console.print(f"{counted(len(edits), 'edit')} of {source} on {tokens} of {options.text}, in one pass")
    with track_count("forecast", "rows", total=len(rows)) as advance_to:
        predicted = forecast(model, _followed(batches, advance_to), [changes for _, changes in edits])
    records = [_record(editor, *edit, found) for edit, found in zip(edits, predicted, strict=True)]
    if options.measure:
        _measure(editor, configs, batches, records)
    _show(records)
    result = {**source.about(), "factors": str(factors.path), "text": options.text, "edits": records}
    if output is not None:
        with new_folder(output.new) as partial:
            (partial / RESULT).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
            price_figure(records, options.text).savefig(partial / "price.png", dpi=110)
    return result


def _followed(batches: Iterable[Mapping[str, Any]], advance_to: Callable[[int], None]) -> Iterator[Mapping[str, Any]]:
    """The batches; tells how many rows are done."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch["input_ids"])
        advance_to(done)


def _record(editor: KFACEditor, report: EditReport, changes: dict[str, Tensor], found: Forecast) -> dict[str, Any]:
    """One edit for JSON: changes of the loss in nats a token."""
    return {
        "edit": report.summary(),
        "n_tokens": found.n_tokens,
        "predicted": {**asdict(found.total), "total": found.total.total},
        "diagonal": sum(editor.diagonal_price(name, dW) for name, dW in changes.items()),
        "layers": {name: asdict(shift) for name, shift in found.layers.items()},
    }


def _measure(
    editor: KFACEditor, configs: list[EditConfig], batches: Iterable[Mapping[str, Any]], records: list[dict[str, Any]]
) -> None:
    """Makes each edit, and adds the change of the loss on the same text."""
    before = _mean_loss(editor.model, batches)
    with track_count("measure", "edits", total=len(configs)) as advance_to:
        for number, (config, record) in enumerate(zip(configs, records, strict=True), start=1):
            editor.apply(config)
            try:
                record["measured"] = _mean_loss(editor.model, batches) - before
            finally:
                editor.restore()
            advance_to(number)


def _mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Of a token."""
    total = 0.0
    count = 0
    for batch in batches:
        tokens = TokenBatch.from_dict(batch).to(next(model.parameters()).device)
        total += target_losses(model, tokens).sum().item()
        count += int(tokens.valid.sum())
    return total / count


def _show(records: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="What edits will cost", title_justify="left")
    places = len({edit_place(record["edit"]) for record in records}) > 1
    for name in ("edit", *(["where"] if places else [])):
        table.add_column(name, overflow="fold")
    for name in ("rho", "kept"):
        table.add_column(name, no_wrap=True, justify="right")
    measured = ["measured"] if "measured" in records[0] else []
    for name in ("first", "second", "total", *measured, "diagonal"):
        table.add_column(name, no_wrap=True, justify="right")
    for record in records:
        edit = record["edit"]
        what = [edit_label(edit), *([edit_place(edit)] if places else [])]
        predicted = record["predicted"]
        figures = [predicted["first"], predicted["second"], predicted["total"], *(record[name] for name in measured)]
        cells = [f"{value:+.4f}" for value in (*figures, record["diagonal"])]
        table.add_row(*what, f"{edit['rho']:g}", f"{edit['fraction_kept']:.1%}", *cells)
    show(table, EXPLANATION, names=3 if places else 2)
