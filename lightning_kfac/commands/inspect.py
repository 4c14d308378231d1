"""Show what is in a factor folder: layers, tokens, spectra, and how much each rho would keep."""

import torch
from jsonargparse import ArgumentParser, Namespace
from rich import box
from rich.table import Table
from torch import Tensor

from lightning_kfac.bases import BasisCache
from lightning_kfac.commands.common import add_precision_option, open_factors
from lightning_kfac.factors import FactorFolder
from lightning_kfac.math.selection import check_rho, select_products
from lightning_kfac.math.spectrum import Spectrum, effective_rank
from lightning_kfac.progress import console, show, track_count
from lightning_kfac.targets import layer_label

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

EXPLANATION = """\
rank: effective rank, exp of the entropy of the eigenvalues' shares
cond.: condition number, the largest eigenvalue over the smallest
kept: share of the components (i, j) that hold rho of the curvature mass"""


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--factors", type=str, help="Factor folder, or a hub repository that holds one.")
    parser.add_argument("--rhos", type=list[float], default=[0.6, 0.7, 0.8, 0.9], help="Shares of the curvature mass.")
    add_precision_option(parser)


def run(options: Namespace) -> None:
    """Prints."""
    for rho in options.rhos:
        check_rho(rho)
    factors = open_factors(options)
    told = [f"{key} {factors.metadata[key]}" for key in TOLD if factors.metadata.get(key) is not None]
    console.print(f"{factors.path}: {len(factors)} layers; " + ", ".join(told))
    if "notes" in factors.metadata:
        console.print(f"imported from {factors.metadata.get('imported_from')}: {factors.metadata['notes']}")
    show(_table(factors, options.rhos, getattr(torch, options.precision)))
    console.print(EXPLANATION)


def _table(factors: FactorFolder, rhos: list[float], dtype: torch.dtype) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "shape", "tokens", "trace A", "trace G", "rank A", "rank G", "cond. A", "cond. G"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name != "layer")
    for rho in rhos:
        table.add_column(f"kept {rho:g}", justify="right")
    bases = BasisCache.beside(factors, dtype)
    with track_count("eigenbases", "layers", total=len(factors)) as advance_to:
        for number, name in enumerate(factors, start=1):
            G, A = bases.of(factors, name)
            d_out, d_in = factors.layer_shape(name)
            n_tokens = factors.metadata["layers"][name]["n_tokens"]
            kept = [_kept(G.values, A.values, rho) for rho in rhos]
            ranks = [f"{effective_rank(s.values):,.1f}" for s in (A, G)]
            traces = [f"{s.values.sum():.3g}" for s in (A, G)]
            cells = [
                layer_label(name),
                f"{d_out} x {d_in}",
                f"{n_tokens:,}",
                *traces,
                *ranks,
                _condition(A),
                _condition(G),
            ]
            table.add_row(*cells, *kept)
            advance_to(number)
    return table


def _kept(lambda_G: Tensor, mu_A: Tensor, rho: float) -> str:
    if not (lambda_G.any() and mu_A.any()):
        return "no curvature"
    return f"{int(select_products(lambda_G, mu_A, rho).sum()) / (len(lambda_G) * len(mu_A)):.1%}"


def _condition(spectrum: Spectrum) -> str:
    smallest = spectrum.values[-1]
    return f"{spectrum.values[0] / smallest:.1e}" if smallest > 0 else "inf"
