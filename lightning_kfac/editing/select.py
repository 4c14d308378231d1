"""The edit of one layer: which components stay, and the new weight. Tensors in, tensors out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.curvature import Basis, LayerCurvature
from lightning_kfac.math.importance import (
    CONTROLS,
    MEASURED,
    components,
    modified,
    original,
    random,
)
from lightning_kfac.math.mixing import add_scores, union_of_count
from lightning_kfac.math.projection import suppress
from lightning_kfac.math.selection import SLACK, select_components, select_count, select_products


class Selection(NamedTuple):
    """What an edit selects of one layer.

    Attributes:
        part: Makes the selected part of the weight, [d_out, d_in], by products in a given precision.
        n_kept, n_total: Components, or singular directions.
        mass: Share of the importance that they hold.
    """

    part: Callable[[torch.dtype], Tensor]
    n_kept: int
    n_total: int
    mass: float


def select(weight: Tensor, curvature: LayerCurvature, config: EditConfig) -> Selection:
    """What the edit selects of one weight.

    Args:
        weight: [d_out, d_in], float32 or float64.
        curvature: The layer's.
        config: The layer's own, with ``curvature.domains`` in mind.

    Raises:
        InputError: There is no curvature to select by.
    """
    if config.formula == "weights":
        return _by_weights(weight, curvature, config)
    if config.formula.startswith("svd"):
        return _by_directions(weight, curvature, config)
    c = curvature.components(weight)
    if curvature.domains:
        return _mixed(weight, curvature, config, c)
    keep, mass = _plain(curvature, config, c)
    return Selection(partial(_part, c, keep, curvature.general), int(keep.sum()), keep.numel(), mass)


def _plain(curvature: LayerCurvature, config: EditConfig, c: Tensor) -> tuple[Tensor, float]:
    """Selection in the general basis: the keep-mask [d_out, d_in] and the share of importance in it."""
    lambda_G, mu_A = curvature.general.G.values, curvature.general.A.values
    if config.formula == "original":
        counts = select_products(lambda_G, mu_A, config.rho)
        prefix = torch.cat([mu_A.new_zeros(1), mu_A.cumsum(0)])
        total = lambda_G.sum() * prefix[-1]
        share = ((lambda_G * prefix[counts]).sum() / total).item() if total else 1.0
        return torch.arange(len(mu_A), device=c.device) < counts[:, None], share
    importance = _importance(curvature, config, c)
    if config.formula == "lowest":
        keep = ~select_count(importance, importance.numel() - _original_count(curvature, config.rho))
    elif _budget(config, mixing=False) == "count":
        keep = select_count(importance, _original_count(curvature, config.rho))
    else:
        keep = select_components(importance, config.rho)
    measure = original(lambda_G, mu_A) if config.formula == "random" else importance
    return keep, _share(measure, keep)


def _mixed(weight: Tensor, curvature: LayerCurvature, config: EditConfig, c: Tensor) -> Selection:
    """Selection with domains: by scores, by union, or in the basis of the added factors."""
    alphas = {domain: 1.0 if config.mix == "union" else config.alpha_of(domain) for domain in curvature.domains}
    basis, own_c = curvature.general, c
    if config.mix == "factors" or config.basis == "mixed":
        basis = curvature.mixed(alphas)
        own_c = components(weight, basis.G.vectors, basis.A.vectors)
    count = None
    if _budget(config, mixing=True) == "count":
        count = int(_plain(curvature, replace(config, budget=None), c)[0].sum())
    if config.mix == "factors":
        importance = _scaled(original(basis.G.values, basis.A.values), config, own_c)
    elif config.mix == "scores":
        parts = [_curvature(curvature, config, basis, domain) for domain in (None, *alphas)]
        mixture = add_scores(parts, [1.0, *alphas.values()], config.normalize == "mass")
        importance = _scaled(mixture, config, own_c)
    else:
        parts = [_scaled(_curvature(curvature, config, basis, d), config, own_c) for d in (None, *alphas)]
        importance = add_scores(parts, [1.0] * len(parts))
    if config.mix == "union" and count is None:
        keep = torch.stack([select_components(part, config.rho) for part in parts]).any(0)
    elif config.mix == "union" and 0 < config.rho < 1:
        keep = union_of_count(parts, config.rho * (1 - SLACK), count)
    else:
        keep = select_components(importance, config.rho) if count is None else select_count(importance, count)
    return Selection(partial(_part, own_c, keep, basis), int(keep.sum()), keep.numel(), _share(importance, keep))


def _part(c: Tensor, keep: Tensor, basis: Basis, dtype: torch.dtype) -> Tensor:
    return suppress(c, keep, basis.G.vectors, basis.A.vectors, dtype)


def _by_weights(weight: Tensor, curvature: LayerCurvature, config: EditConfig) -> Selection:
    importance = weight.double() ** 2
    if _budget(config, mixing=False) == "mass":
        keep = select_components(importance, config.rho)
    else:
        keep = select_count(importance, _original_count(curvature, config.rho))
    return Selection(lambda dtype: weight * keep, int(keep.sum()), keep.numel(), _share(importance, keep))


def _by_directions(weight: Tensor, curvature: LayerCurvature, config: EditConfig) -> Selection:
    """The leading singular directions of the weight."""
    count, total = _original_count(curvature, config.rho), weight.numel()
    directions = min(weight.shape)
    if config.formula == "svd":
        n_kept = round(count / total * directions)
    else:
        n_kept = min(directions, round(count / sum(weight.shape))) if count < total else directions
    u, sigma, v = curvature.singular(weight)
    energy = sigma.double() ** 2
    mass = (energy[:n_kept].sum() / energy.sum()).item() if energy.any() else 1.0
    return Selection(lambda dtype: (u[:, :n_kept] * sigma[:n_kept]) @ v[:n_kept], n_kept, directions, mass)


def _original_count(curvature: LayerCurvature, rho: float) -> int:
    return int(select_products(curvature.general.G.values, curvature.general.A.values, rho).sum())


def _importance(curvature: LayerCurvature, config: EditConfig, c: Tensor) -> Tensor:
    """S [d_out, d_in] of a formula in the general basis, float64."""
    if config.formula == "random":
        return random(tuple(c.shape), config.seed, curvature.name).to(c.device)
    if config.formula == "magnitude":
        return c.double() ** 2
    return _scaled(_curvature(curvature, config, curvature.general, None), config, c)


def _curvature(curvature: LayerCurvature, config: EditConfig, basis: Basis, domain: str | None) -> Tensor:
    """The curvature part of a formula: measured, or a product."""
    return curvature.measured(domain) if config.formula in MEASURED else curvature.product(basis, domain)


def _scaled(curvature: Tensor, config: EditConfig, c: Tensor) -> Tensor:
    """With the factor C^2 where the formula has it."""
    return modified(curvature, c) if config.formula.endswith("modified") else curvature


def _budget(config: EditConfig, mixing: bool) -> str:
    return config.budget or ("count" if mixing or config.formula in CONTROLS else "mass")


def _share(importance: Tensor, keep: Tensor) -> float:
    total = importance.sum()
    return (importance[keep].sum() / total).item() if total else 1.0
