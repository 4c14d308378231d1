"""Show what is in a factor folder: layers, tokens, spectra, and how much each rho would keep."""

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.figures_out import RETURNED
from lightning_kfac.cli.options import (
    add_model_options,
    add_precision_option,
    check_not_within,
    named_model,
    open_factors,
    open_model,
    output_folder,
)
from lightning_kfac.console import console, counted, show, track_count
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.factors.spectra import LayerSpectrum, layer_spectrum
from lightning_kfac.math.selection import check_rho, select_products
from lightning_kfac.models.targets import layer_label
from lightning_kfac.reporting.figures.price import price_curve_figure
from lightning_kfac.reporting.spectra_board import save_spectra, write_spectra
from lightning_kfac.storage.files import new_folder

TOLD = (
    "model",
    "corpus",
    "n_tokens",
    "labels",
    "mc_samples",
    "precision",
    "seed",
    "world_size",
    "fingerprint",
    "version",
)

EXPLANATION = (
    "rank: effective rank, exp of the entropy of the eigenvalues' shares",
    "cond.: condition number, the largest eigenvalue over the smallest",
    "kept: share of the components (i, j) that hold rho of the curvature mass",
)

FIGURES = RETURNED


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--factors", type=str, help="Factor folder, or a hub repository that holds one.")
    parser.add_argument("--rhos", type=list[float], default=[0.6, 0.7, 0.8, 0.9], help="Shares of the curvature mass.")
    parser.add_argument(
        "--prices",
        action="store_true",
        help="Also what keeping each rho costs, to second order, without any text. Reads the model.",
    )
    add_model_options(parser)
    parser.add_argument("--output", type=str, help="Write figures of the last rho, numbers and a TensorBoard page.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")
    add_precision_option(parser)


def run(options: Namespace) -> dict[str, Any]:
    """Prints; returns the figures."""
    for rho in options.rhos:
        check_rho(rho)
    factors = open_factors(options)
    if options.output is None:
        return _figures(_show(options, factors), _prices(options, factors))
    if not options.rhos:
        raise InputError("--rhos is empty: figures show the last rho of the list")
    check_not_within(Path(options.output), {"the factors": factors.path})
    with output_folder(options, "inspect") as output:
        spectra = _show(options, factors)
        prices = _prices(options, factors)
        with new_folder(output.new) as partial:
            save_spectra(partial, spectra)
            if prices:
                price_curve_figure(prices).savefig(partial / "prices.png", dpi=110)
                (partial / "prices.json").write_text(json.dumps(prices, indent=2) + "\n", "utf-8")
            with SummaryWriter(str(partial / "tensorboard")) as writer:
                write_spectra(writer, spectra)
    console.print(f"figures, spectra.json and tensorboard/ are in {output.path}/")
    return _figures(spectra, prices)


def _figures(spectra: dict[str, LayerSpectrum], prices: dict[str, dict[float, float]]) -> dict[str, Any]:
    return {"layers": {name: layer.numbers() for name, layer in spectra.items()}, "prices": prices}


def _show(options: Namespace, factors: FactorFolder) -> dict[str, LayerSpectrum]:
    """Prints what there is; returns the spectra."""
    told = [f"{key} {factors.metadata[key]}" for key in TOLD if factors.metadata.get(key) is not None]
    console.print(f"{factors.path}: {counted(len(factors), 'layer')}; " + ", ".join(told))
    if "notes" in factors.metadata:
        console.print(f"imported from {factors.metadata.get('imported_from')}: {factors.metadata['notes']}")
    spectra = _spectra(factors, getattr(torch, options.precision), options.rhos[-1] if options.rhos else None)
    show(_table(factors, spectra, options.rhos), EXPLANATION)
    return spectra


def _prices(options: Namespace, factors: FactorFolder) -> dict[str, dict[float, float]]:
    """What the curvature that was collected says that keeping each rho costs: nats a token, by formula."""
    if not options.prices:
        return {}
    source = named_model(options, factors.metadata, factors.path)
    editor = KFACEditor(open_model(source, options), factors, dtype=options.precision, repeated=True)
    there = editor.collected()
    formulas = [f.name for f in FORMULAS.values() if not f.control and set(f.needs) <= there and not f.rectangle]
    table = Table(
        box=box.SIMPLE_HEAD, title="What an edit of all these layers costs, nats a token", title_justify="left"
    )
    table.add_column("formula", no_wrap=True)
    for rho in options.rhos:
        table.add_column(f"rho {rho:g}", justify="right", no_wrap=True)
    prices: dict[str, dict[float, float]] = {}
    with track_count("prices", "edits", total=len(formulas) * len(options.rhos)) as advance_to:
        for formula in formulas:
            prices[formula] = {}
            for rho in options.rhos:
                _, changes = editor.changes(EditConfig(rho=rho, formula=formula))
                prices[formula][rho] = sum(editor.diagonal_price(name, dW) for name, dW in changes.items())
                advance_to(sum(map(len, prices.values())))
            table.add_row(formula, *(f"{price:+.4f}" for price in prices[formula].values()))
    show(table)
    measured = "moments" if "moments" in there else "coupled factors" if "coupled" in there else "A and G"
    console.print(f"to second order, without any text, by the {measured}; rho is another share for each formula")
    return prices


def _table(factors: FactorFolder, spectra: dict[str, LayerSpectrum], rhos: list[float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    counts = {name: factors.metadata["layers"][name]["n_tokens"] for name in spectra}
    apart = ["tokens"] if len(set(counts.values())) > 1 else []  # else the line above says it
    names = ["shape", *apart, "trace A", "trace G", "rank A", "rank G", "cond. A", "cond. G"]
    for name in (*names, *(f"kept {rho:g}" for rho in rhos)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, layer in spectra.items():
        cells = [layer_label(name), f"{len(layer.lambdas)} x {len(layer.mu)}", *(f"{counts[name]:,}" for _ in apart)]
        cells += [f"{value:.3g}" for value in (layer.trace_A, layer.trace_G)]
        cells += [f"{value:,.1f}" for value in (layer.rank_A, layer.rank_G)]
        cells += [f"{value:.1e}" for value in (layer.condition_A, layer.condition_G)]
        table.add_row(*cells, *(_kept(layer, rho) for rho in rhos))
    return table


def _spectra(factors: FactorFolder, dtype: torch.dtype, rho: float | None) -> dict[str, LayerSpectrum]:
    bases = BasisCache.beside(factors, dtype)
    spectra: dict[str, LayerSpectrum] = {}
    with track_count("eigenbases", "layers", total=len(factors)) as advance_to:
        for number, name in enumerate(factors, start=1):
            G, A = bases.of(factors, name)
            spectra[name] = layer_spectrum(G.values, A.values, rho)
            advance_to(number)
    return spectra


def _kept(layer: LayerSpectrum, rho: float) -> str:
    if not (layer.lambdas.any() and layer.mu.any()):
        return "no curvature"
    kept = select_products(torch.from_numpy(layer.lambdas), torch.from_numpy(layer.mu), rho).sum()
    return f"{int(kept) / (len(layer.lambdas) * len(layer.mu)):.1%}"
