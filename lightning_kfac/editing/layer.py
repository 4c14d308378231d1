"""The edit of one layer: its new weight, and what was done. Tensors in, tensors out."""

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.curvature import LayerCurvature
from lightning_kfac.editing.report import LayerReport
from lightning_kfac.editing.select import Selection, select
from lightning_kfac.errors import InputError
from lightning_kfac.math.finite import all_finite


def edit_layer(
    weight: Tensor, curvature: LayerCurvature, config: EditConfig, domains: Collection[str] = ()
) -> tuple[Tensor | None, LayerReport]:
    """The new weight of a layer, or None where every bit stays, and what was done.

    Args:
        weight: W [d_out, d_in], on any device and in any dtype.
        curvature: The layer's.
        config: The layer's own.
        domains: Those that have a say.

    Returns:
        W' [d_out, d_in] on the curvature's device, in the weight's dtype.

    Raises:
        InputError: A number is not finite, or the layer cannot be selected from.
    """
    name = curvature.name
    if not all_finite(weight):
        raise InputError(f"{name}: the weight has NaN or infinite entries")
    W = weight.to(curvature.device, curvature.sources.bases.dtype)
    try:
        selected = select(W, curvature, config, domains)
    except InputError as error:
        raise InputError(f"{name}: {error}", *error.settings) from None
    products = torch.float64 if weight.dtype == torch.float64 else torch.float32
    edited = _applied(W, selected, config.mode == "ablate", products)
    curvature.release()
    if edited is None:
        return None, _report(name, weight, weight, selected, config, products)
    edited = edited.to(weight.dtype)
    if not all_finite(edited):
        raise InputError(f"{name}: the edited weight would have NaN or infinite entries")
    return edited, _report(name, weight, edited.to(weight.device), selected, config, products)


def _applied(W: Tensor, selected: Selection, ablate: bool, products: torch.dtype) -> Tensor | None:
    everything = selected.n_kept == selected.n_total
    if not ablate:
        return None if everything else selected.part(products)
    if not selected.n_kept:
        return None
    return torch.zeros_like(W) if everything else W - selected.part(products)


def _report(
    name: str, before: Tensor, after: Tensor, selected: Selection, config: EditConfig, products: torch.dtype
) -> LayerReport:
    norm = _norm(before)
    ablated = config.mode == "ablate"
    n_kept = selected.n_total - selected.n_kept if ablated else selected.n_kept
    return LayerReport(
        name=name,
        n_kept=n_kept,
        n_total=selected.n_total,
        fraction_kept=n_kept / selected.n_total,
        mass_kept=1 - selected.mass if ablated else selected.mass,
        norm_before=norm,
        norm_after=_norm(after),
        relative_change=_norm(after.to(products) - before.to(products)) / norm if norm else 0.0,
        rho=config.rho,
        formula=config.formula,
    )


def _norm(matrix: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
