"""Show how strongly texts excite each band of curvature, from the highest to the lowest, layer by layer."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.options import (
    add_model_options,
    add_precision_option,
    check_not_within,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
    output_folder,
)
from lightning_kfac.cli.text_rows import add_row_options, text_rows
from lightning_kfac.console import console, say, show, track_count, visible
from lightning_kfac.data.loaders import TokenRows, row_loader
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.excitation import Excitation, excitation, layer_forms
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.math.bands import Bands, Exponent, band_ratios, band_shares, whitening_exponent
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.targets import layer_labels
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.reporting.figures.bands import bands_figure, ratios_figure, whitening_figure
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.json_files import for_json

NOTED = True
RESULT = "bands.json"
FIGURES = RESULT
FEWEST_SHARDS = 16


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    parser.add_argument("--factors", type=str, help="Factor folder, or a hub repository that holds one.")
    parser.add_argument(
        "--texts",
        type=dict[str, str] | None,
        help="--texts.NAME SOURCE: a memorized set, or a corpus (embedded, a file or folder, a hub data set).",
    )
    parser.add_argument("--against", type=str, help="Ratios are taken to this text; by default the last one.")
    parser.add_argument("--bands", type=int, default=10, help="Bands of equal component count.")
    parser.add_argument(
        "--directions",
        type=Literal["curvature", "svd"],
        default="curvature",
        help="Bands of what: components of the curvature basis, or the weight's singular directions.",
    )
    parser.add_argument(
        "--cuts",
        type=list[float] | None,
        help="Instead: where each band ends, as shares of all components; the paper's are [0.1, 0.25, 0.5, 1].",
    )
    parser.add_argument("--shards", type=int, default=32, help="Parts of each text: whole documents, for intervals.")
    add_row_options(parser, max_tokens=100_000)
    parser.add_argument("--output", type=str, default="runs/bands", help="Folder of figures, numbers, TensorBoard.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")
    add_precision_option(parser)


def run(options: Namespace) -> None:
    """Measures every text and shows the profiles."""
    factors = open_factors(options)
    texts = dict(options.texts or {})
    model_source = named_model(options, factors.metadata, factors.path)
    if not texts:
        raise InputError("--texts is missing: name texts as --texts.memorized FILE --texts.clean FILE")
    if wrong := [text for text in texts if not re.fullmatch(r"[\w-]+", text)]:
        raise InputError(f"--texts: the name {wrong[0]!r} may hold letters, digits, - and _ only")
    against = options.against or list(texts)[-1]
    if against not in texts:
        raise InputError(f"--against {against}: no such text; there are {', '.join(texts)}")
    if options.shards < FEWEST_SHARDS or options.bands < 2:
        raise InputError(f"--shards must be at least {FEWEST_SHARDS} and --bands at least 2")
    cuts = options.cuts
    if cuts is not None and (len(cuts) < 2 or sorted(set(cuts)) != cuts or not 0 < cuts[0] <= cuts[-1] <= 1):
        raise InputError(f"--cuts {cuts}: at least two shares above 0 and up to 1, ascending")
    check_not_within(Path(options.output), {"the factors": factors.path, "the model": model_source})
    with output_folder(options, "bands") as output:
        _measure(options, factors, model_source, texts, against, output.new)
    console.print(
        f"{RESULT}, figures and tensorboard/ are in {output.path}/. "
        "Root mean squares; the paper averages norms instead."
    )


def _measure(
    options: Namespace,
    factors: FactorFolder,
    model_source: ModelSource,
    texts: dict[str, str],
    against: str,
    output: Path,
) -> None:
    model = open_model(model_source, options)
    tokenizer = load_tokenizer(model_source, own_tokenizer=options.data.own_tokenizer)
    fingerprint = tokenizer_fingerprint(tokenizer)
    note_other_tokenizer(factors, fingerprint)
    config: Any = model.config
    vocab_size = config.get_text_config().vocab_size
    with new_folder(output) as partial:
        rows = {}
        bounds = {}
        for text, source in texts.items():
            rows[text] = text_rows(source, tokenizer, vocab_size, options, partial / "data")
            bounds[text] = _bounds(rows[text], options.shards)
            if len(bounds[text]) <= FEWEST_SHARDS:
                bounds[text] = bounds[text][[0, -1]]
                say(f"{source}: intervals are n/a: they need {FEWEST_SHARDS} documents in as many rows")
        bases = BasisCache.beside(factors, getattr(torch, options.precision))
        with track_count("curvature bands", "layers", total=len(factors)) as advance_to:
            forms = layer_forms(model, factors, bases, options.cuts or options.bands, options.directions == "svd")
            advance_to(len(factors))
        found = {}
        for text in texts:
            with track_count(f"run {text}", "rows", total=len(rows[text])) as advance_to:
                shards = _shards(rows[text], bounds[text], options.batch_size, advance_to)
                found[text] = excitation(model, factors, forms, shards)
        made_by = {"tokenizer_fingerprint": fingerprint, "directions": options.directions, "cuts": options.cuts}
        _write(
            partial, found, against, {**model_source.about(), **made_by, "texts": texts, "factors": str(factors.path)}
        )


def _bounds(rows: TokenRows, count: int) -> np.ndarray:
    """Numbers of the rows where shards begin and end: so many of whole documents, up to the row that two of them share.

    Fewer where there are fewer documents: rows of the same one are no sample of others.
    """
    ends = rows.ends if rows.ends is not None else rows.offsets[1:]
    last_of_shard = np.linspace(0, len(ends), min(count, len(ends)) + 1).astype(int)[1:] - 1
    return np.unique([0, *np.searchsorted(rows.offsets, ends[last_of_shard])])


def _shards(
    rows: TokenRows, bounds: np.ndarray, batch_size: int, advance_to: Callable[[int], None]
) -> Iterator[DataLoader[Any]]:
    """Batches of each stretch of the text."""
    for first, last in pairwise(bounds):
        yield row_loader(TokenRows(rows.tokens, rows.offsets[first : last + 1], rows.start), batch_size, 0, 1)
        advance_to(int(last))


def _write(folder: Path, found: dict[str, dict[str, Excitation]], against: str, about: dict[str, Any]) -> None:
    others = [text for text in found if text != against]
    layers: dict[str, dict[str, Any]] = {}
    by_text: dict[str, dict[str, Bands]] = {}
    exponents: dict[str, dict[str, dict[str, Exponent]]] = {}
    labels = layer_labels(found[against])
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name in found[against]:
            label = labels[name]
            base = found[against][name]
            shares = {text: band_shares(layer[name].energies) for text, layer in found.items()}
            ratios = {text: band_ratios(*found[text][name][:2], *base[:2]) for text in others}
            for text in others:
                exponents.setdefault(text, {})[label] = _exponents(found[text][name], base)
            for text, bands in ratios.items():
                by_text.setdefault(text, {})[label] = bands
            figure = bands_figure(label, shares, ratios or shares, against)
            figure.savefig(folder / f"bands_{label.replace(' ', '_')}.png", dpi=110)
            writer.add_figure(f"bands/{visible(label)}", figure)
            layers[name] = {
                text: {"share": _numbers(shares[text]), **({"ratio": _numbers(ratios[text])} if text in ratios else {})}
                for text in found
            }
            for text in others:
                of_text = exponents[text][label]
                layers[name][text]["whitening"] = {side: for_json(e._asdict()) for side, e in of_text.items()}
        for text, of_layers in by_text.items():
            figure = ratios_figure(text, against, of_layers)
            figure.savefig(folder / f"ratios_{text}.png", dpi=110)
            writer.add_figure(f"bands/{visible(text)} over {visible(against)}", figure)
            show(_table(text, against, of_layers))
            figure = whitening_figure(text, against, exponents[text])
            figure.savefig(folder / f"whitening_{text}.png", dpi=110)
            writer.add_figure(f"bands/whitening of {visible(text)}", figure)
            words = f"exponent: slope over directions of log(energy / that of {against}) on log(that of {against})"
            show(_whitening_table(text, against, exponents[text]), [words])
    counts = {text: int(next(iter(layer.values())).counts.sum()) for text, layer in found.items()}
    result = {**about, "against": against, "n_positions": counts, "statistic": "root mean square", "layers": layers}
    (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def _numbers(bands: Bands) -> dict[str, list[float | None]]:
    return {name: [None if np.isnan(v) else v for v in values.tolist()] for name, values in bands._asdict().items()}


def _table(text: str, against: str, layers: dict[str, Bands]) -> Table:
    title = f"RMS output on {text} over that on {against}, by band of curvature (1: highest), within 95 %"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=0)
    table.add_column("layer", overflow="fold")
    count = len(next(iter(layers.values())).value)
    for number in range(1, count + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for label, bands in layers.items():
        # The interval below the figure, so that ten bands fit a terminal.
        table.add_row(label, *(_cell(*figures, "\n") for figures in zip(*bands, strict=True)))
    return table


def _exponents(text: Excitation, other: Excitation) -> dict[str, Exponent]:
    """Of inputs and outputs of one layer."""
    return {
        "inputs": whitening_exponent(text.inputs, text.counts, other.inputs, other.counts),
        "outputs": whitening_exponent(text.outputs, text.counts, other.outputs, other.counts),
    }


def _whitening_table(text: str, against: str, layers: dict[str, dict[str, Exponent]]) -> Table:
    title = f"Whitening exponent of {text} against {against}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for side in ("inputs", "outputs"):
        table.add_column(side, justify="right", no_wrap=True)
    for label, sides in layers.items():
        table.add_row(label, *(_cell(*exponent) for exponent in sides.values()))
    return table


def _cell(value: float, low: float, high: float, between: str = " ") -> Text:
    return Text.assemble(f"{value:.2f}{between}", "n/a" if np.isnan(low) else f"±{max(value - low, high - value):.2f}")
