"""Spectra as a page of TensorBoard, and as files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.console import visible
from lightning_kfac.factors.spectra import LayerSpectrum, by_projection, log10_histogram
from lightning_kfac.models.targets import layer_labels
from lightning_kfac.reporting.escape import as_markdown
from lightning_kfac.reporting.figures.spectra import kept_figure, mass_figure, spectra_figure

if TYPE_CHECKING:
    from lightning_kfac.reporting.board import Board  # loads Lightning, which inspect does without


def write_spectra(writer: SummaryWriter, spectra: Mapping[str, LayerSpectrum]) -> None:
    """Figures, log10 histograms and a table; about 0.1 MB a layer whatever its size."""
    for tag, figure in spectrum_figures(spectra):
        writer.add_figure(tag, figure)
    labels = layer_labels(spectra)
    for name, layer in spectra.items():
        for side, values in (("A", layer.mu), ("G", layer.lambdas)):
            if (values > 0).any():
                writer.add_histogram(f"log10 eigenvalues/{visible(labels[name])} {side}", log10_histogram(values))
    writer.add_text("spectra", spectra_markdown(spectra))


def show_spectra(board: "Board", spectra: Mapping[str, LayerSpectrum]) -> None:
    """The figures and the table through other loggers."""
    for tag, figure in spectrum_figures(spectra):
        board.figure(tag, figure)
    board.text("spectra", spectra_markdown(spectra))


def save_spectra(folder: Path, spectra: Mapping[str, LayerSpectrum]) -> None:
    """The same as PNG files, and the numbers in ``spectra.json``."""
    for tag, figure in spectrum_figures(spectra):
        figure.savefig(folder / f"{tag.replace('/', '_').replace(' ', '_')}.png", dpi=110)
    numbers = {name: layer.numbers() for name, layer in spectra.items()}
    (folder / "spectra.json").write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")


def spectrum_figures(spectra: Mapping[str, LayerSpectrum]) -> Iterator[tuple[str, Figure]]:
    """Every figure with its name: two for each projection, one for each layer."""
    for projection, layers in by_projection(spectra).items():
        yield f"spectra/{projection} eigenvalues", spectra_figure(projection, layers)
        yield f"spectra/{projection} mass", mass_figure(projection, layers)
    labels = layer_labels(spectra)
    for name, layer in spectra.items():
        if layer.cut is not None and layer.cut.kept.any():
            yield f"kept/{visible(labels[name])}", kept_figure(labels[name], layer, layer.cut)


def spectra_markdown(spectra: Mapping[str, LayerSpectrum]) -> str:
    """A table for TensorBoard's text page."""
    labels = layer_labels(spectra)
    lines = ["| layer | size | effective rank A | G | condition A | G | kept at rho |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, layer in spectra.items():
        cells = [as_markdown(labels[name]), f"{len(layer.lambdas)} x {len(layer.mu)}", f"{layer.rank_A:,.1f}"]
        cells += [f"{layer.rank_G:,.1f}", f"{layer.condition_A:.1e}", f"{layer.condition_G:.1e}"]
        cells += ["" if layer.cut is None else f"{layer.cut.fraction_kept:.1%} at {layer.cut.rho:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
