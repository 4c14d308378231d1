"""Show which layers are coupled to what a model recites, and to ordinary text, in one backward pass."""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from lightning_kfac.cli.figures_out import RETURNED
from lightning_kfac.cli.options import add_model_options, check_not_within, named_model, open_model, output_folder
from lightning_kfac.cli.text_rows import add_row_options, text_rows
from lightning_kfac.collection.coupling import best_window, layer_coupling, ratios
from lightning_kfac.console import command_line, console, counted, show
from lightning_kfac.data.loaders import row_loader
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import IGNORED
from lightning_kfac.math.statistics import rank_correlation
from lightning_kfac.models.choices import Blocks, Projections
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.targets import PROJECTIONS, block_of, projection_of, resolve_targets
from lightning_kfac.reporting.figures.layer_map import layer_map_figure
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.output_folder import OutputFolder
from lightning_kfac.storage.results import read_results
from lightning_kfac.storage.run_folder import RESULTS

RESULT = "map.json"
FIGURES = RETURNED
WIDTH = 3
Place = tuple[int, str]


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, required=True)
    parser.add_argument("--memorized", type=str, required=True, help="What the model recites: a memorized set.")
    parser.add_argument("--text", type=str, default="embedded", help="Ordinary text: a corpus, or a memorized set.")
    parser.add_argument("--blocks", type=Blocks, default="all", help="Block numbers, negative from the end, or all.")
    parser.add_argument("--projections", type=Projections | None, help="Which to look at; by default all of the MLPs.")
    parser.add_argument("--scan", type=str, help="Folder of a scan of the same model, to compare with.")
    parser.add_argument("--output", type=str, help="Folder of the numbers and a figure; by default only a table.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")
    add_row_options(parser, max_tokens=10_000)


def run(options: Namespace) -> dict[str, Any]:
    """Measures, shows and recommends; returns the figures."""
    source = named_model(options, {}, "")
    scanned = _scanned(Path(options.scan)) if options.scan else {}
    if options.output is None:
        return _map(options, source, scanned, None)
    check_not_within(Path(options.output), {"the model": source, "the scan": options.scan})
    with output_folder(options, "map") as output:
        found = _map(options, source, scanned, output)
    console.print(f"{RESULT} and map.png are in {output.path}/")
    return found


def _map(
    options: Namespace, source: ModelSource, scanned: dict[Place, float], output: OutputFolder | None
) -> dict[str, Any]:
    tokenizer = load_tokenizer(source, own_tokenizer=options.data.own_tokenizer)
    model = open_model(source, options)
    about: Any = model.config
    vocabulary = about.get_text_config().vocab_size
    sequences = load_memorized(options.memorized, tokenizer, vocabulary)
    layers = resolve_targets(model, options.blocks, options.projections)
    with tempfile.TemporaryDirectory() as folder:
        rows = text_rows(options.text, tokenizer, vocabulary, options, Path(folder))
    begin = time.monotonic()
    memorized = layer_coupling(model, list(_suffixes(sequences, options.batch_size)), layers)
    ordinary = layer_coupling(model, row_loader(rows, options.batch_size, 0, 1), layers)
    seconds = time.monotonic() - begin
    console.print(
        f"{source}: {counted(len(layers), 'layer')}, suffixes of {counted(len(sequences), 'sequence')} of "
        f"{options.memorized} against {counted(len(rows.tokens), 'token')} of {options.text}; {seconds:.1f} s"
    )
    by_place = _by_place(ratios(memorized, ordinary))
    show(_table(by_place))
    window = _recommend(by_place, source)
    correlation = _compare(by_place, scanned)
    found = {
        **source.about(),
        "memorized": options.memorized,
        "text": options.text,
        "seconds": seconds,
        "layers": {n: {"memorized": memorized[n], "ordinary": ordinary[n]} for n in layers},
        "recommended_blocks": window,
        "rank_correlation_with_scan": correlation,
    }
    if output is not None:
        with new_folder(output.new) as partial:
            (partial / RESULT).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
            layer_map_figure(by_place, str(source)).savefig(partial / "map.png", dpi=110)
    return found


def _suffixes(sequences: Sequence[MemorizedSequence], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of whole sequences, of which the suffixes' tokens count."""
    for first in range(0, len(sequences), batch_size):
        part = sequences[first : first + batch_size]
        rows = [torch.tensor([*s.prefix, *s.suffix]) for s in part]
        labels = [torch.tensor([*[IGNORED] * len(s.prefix), *s.suffix]) for s in part]
        yield {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


def _by_place(values: dict[str, float]) -> dict[Place, float]:
    """Means of the layers of each block and projection: experts are several."""
    found: dict[Place, list[float]] = {}
    for name in values:
        block = block_of(name)
        projection = projection_of(name)
        if block is not None and projection is not None:
            found.setdefault((block, projection), []).append(values[name])
    return {place: sum(several) / len(several) for place, several in found.items()}


def _table(values: dict[Place, float]) -> Table:
    projections = [p for p in PROJECTIONS if any(place[1] == p for place in values)]
    table = Table(box=box.SIMPLE_HEAD, title="Coupling to the memorized text over that to ordinary text")
    table.title_justify = "left"
    table.add_column("block", justify="right")
    for projection in projections:
        table.add_column(projection, justify="right", no_wrap=True)
    for block in sorted({place[0] for place in values}):
        cells = [f"{values[block, p]:.2f}" if (block, p) in values else "" for p in projections]
        table.add_row(str(block), *cells)
    return table


def _recommend(values: dict[Place, float], source: ModelSource) -> list[int]:
    blocks: dict[int, float] = {}
    for (block, _), value in values.items():
        blocks[block] = blocks.get(block, 0.0) + value
    window = best_window(blocks, WIDTH)
    chosen = ",".join(map(str, window))
    command = command_line("fit", "--model.model_name", source, "--collect.blocks", f"[{chosen}]", "--edit.rho", "0.6")
    console.print(f"blocks {chosen} stand out most. A hint, not a measurement: scan measures edits of each block.")
    console.print(f"collect there: {command}")
    return window


def _scanned(folder: Path) -> dict[Place, float]:
    """How much strict accuracy the edit of each block and projection alone took away, from a scan."""
    rows = read_results(folder / RESULTS)
    baseline = next((row for row in rows if row.get("stage") == "baseline"), None)
    if baseline is None:
        raise InputError(f"{folder}: no results of a scan; give the folder that `scan` wrote")
    found: dict[Place, float] = {}
    for row in rows:
        edit = row.get("edit")
        if edit and len(edit["blocks"]) == len(edit["projections"]) == 1 and row.get("strict_acc") is not None:
            place = edit["blocks"][0], edit["projections"][0]
            found.setdefault(place, baseline["strict_acc"] - row["strict_acc"])
    return found


def _compare(values: dict[Place, float], scanned: dict[Place, float]) -> float | None:
    """The rank correlation with a scan over places that both have."""
    shared = [place for place in values if place in scanned]
    if not scanned:
        return None
    found = math.nan
    if len(shared) > 2:
        found = rank_correlation([values[p] for p in shared], [scanned[p] for p in shared])
    if math.isnan(found):
        console.print(f"rank correlation with the scan: n/a ({len(shared)} places in both)")
        return None
    console.print(f"rank correlation with what the scan's single edits took away: {found:+.2f} ({len(shared)} places)")
    return found
