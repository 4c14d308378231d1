"""The edit of one layer: which components stay, and the new weight. Tensors in, tensors out."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.curvature import Basis, LayerCurvature
from lightning_kfac.editing.formulas import FORMULAS, Formula
from lightning_kfac.math.importance import components, original
from lightning_kfac.math.mixing import add_scores, union_of_count
from lightning_kfac.math.projection import suppress
from lightning_kfac.math.selection import SLACK, select_components, select_count, select_products

# So small a weight's importance is made and selected from sooner than a bisection takes its steps.
SMALL = 2**17


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


def select(weight: Tensor, curvature: LayerCurvature, config: EditConfig, domains: Collection[str] = ()) -> Selection:
    """What the edit selects of one weight.

    Args:
        weight: [d_out, d_in], float32 or float64.
        curvature: The layer's.
        config: The layer's own.
        domains: Those that have a say.

    Raises:
        InputError: There is no curvature to select by.
    """
    formula = FORMULAS[config.formula]
    if formula.directions is not None:
        return _by_directions(weight, curvature, formula.directions, config.rho)
    if formula.rectangle:
        keep, mass = _rectangle(curvature, *config.sides)
        c = curvature.components(weight)
        return Selection(partial(_part, c, keep, curvature.general), int(keep.count_nonzero()), keep.numel(), mass)
    if formula.entries:
        keep, mass = _kept(weight, curvature, formula, config)
        return Selection(lambda dtype: weight * keep, int(keep.count_nonzero()), keep.numel(), mass)
    c = curvature.components(weight)
    if domains:
        return _mixed(weight, curvature, formula, config, c, domains)
    keep, mass = _kept(c, curvature, formula, config)
    return Selection(partial(_part, c, keep, curvature.general), int(keep.count_nonzero()), keep.numel(), mass)


def _kept(ranked: Tensor, curvature: LayerCurvature, formula: Formula, config: EditConfig) -> tuple[Tensor, float]:
    """Selection by the general text alone: the keep-mask [d_out, d_in] and the share of importance in it."""
    budget = config.budget or formula.budget
    # As many as it keeps is what it keeps.
    if formula.product and (budget == "mass" or formula.counted) and ranked.numel() > SMALL:
        return _staircase(curvature, config.rho)
    importance = formula.importance(curvature, ranked, config.seed)
    if formula.least:
        keep = ~select_count(importance, importance.numel() - _original_count(curvature, config.rho))
    elif budget == "count":
        keep = select_count(importance, _original_count(curvature, config.rho))
    else:
        keep = select_components(importance, config.rho)
    if not formula.mass:
        importance = original(curvature.general.G.values, curvature.general.A.values)
    return keep, _share(importance, keep)


def _staircase(curvature: LayerCurvature, rho: float) -> tuple[Tensor, float]:
    """The same for a product of spectra, which is never made: in row i the leading columns are kept."""
    lambda_G = curvature.general.G.values
    mu_A = curvature.general.A.values
    counts = select_products(lambda_G, mu_A, rho)
    prefix = torch.cat([mu_A.new_zeros(1), mu_A.cumsum(0)])
    total = lambda_G.sum() * prefix[-1]
    share = ((lambda_G * prefix[counts]).sum() / total).item() if total else 1.0
    return torch.arange(len(mu_A), device=mu_A.device) < counts[:, None], share


def _rectangle(curvature: LayerCurvature, rho_G: float, rho_A: float) -> tuple[Tensor, float]:
    """The leading directions on each side that hold a share of its spectrum, and what they hold of both."""
    sides = (curvature.general.G.values, rho_G), (curvature.general.A.values, rho_A)
    leading = [select_components(values, rho) for values, rho in sides]
    mass = math.prod(_share(values, kept) for (values, _), kept in zip(sides, leading, strict=True))
    return leading[0][:, None] & leading[1], mass


def _mixed(
    weight: Tensor,
    curvature: LayerCurvature,
    formula: Formula,
    config: EditConfig,
    c: Tensor,
    domains: Collection[str],
) -> Selection:
    """Selection with domains, in the general basis or in that of the added factors."""
    alphas = {domain: 1.0 if config.mix == "union" else config.alpha_of(domain) for domain in domains}
    count = None
    if (config.budget or "count") == "count":
        keep, _ = _kept(c, curvature, formula, replace(config, budget=None))
        count = int(keep.count_nonzero())
    basis = curvature.general
    if config.mix == "factors" or config.basis == "mixed":
        basis = curvature.mixed(alphas)
        c = components(weight, basis.G.vectors, basis.A.vectors)
    texts = Texts(curvature, formula, basis, c, alphas)
    if config.mix == "union":
        keep, mass = _by_union(texts, config.rho, count)
    elif config.mix == "factors":
        keep, mass = _by_importance(texts.added_factors(), config.rho, count)
    else:
        keep, mass = _by_importance(texts.added_scores(config.normalize == "mass"), config.rho, count)
    return Selection(partial(_part, c, keep, basis), int(keep.count_nonzero()), keep.numel(), mass)


class Texts(NamedTuple):
    """The general text and the domains, and how they rank the components of one weight in one basis.

    Attributes:
        c: C of the weight in the basis, [d_out, d_in].
        alphas: Weights of the domains.
    """

    curvature: LayerCurvature
    formula: Formula
    basis: Basis
    c: Tensor
    alphas: dict[str, float]

    def parts(self) -> list[Tensor]:
        """The curvature part of S of each text, the general one first. float64 [d_out, d_in] each."""
        return [self.formula.part(self.curvature, self.basis, domain) for domain in (None, *self.alphas)]

    def added_scores(self, normalize: bool) -> Tensor:
        """S of the weighted sum of the parts."""
        return self.scaled(add_scores(self.parts(), [1.0, *self.alphas.values()], normalize))

    def added_factors(self) -> Tensor:
        """S of the spectra of the added factors, whose basis this is."""
        return self.scaled(original(self.basis.G.values, self.basis.A.values))

    def scaled(self, part: Tensor) -> Tensor:
        """S from a curvature part."""
        return self.formula.scaled(part, self.c)


def _by_union(texts: Texts, rho: float, count: int | None) -> tuple[Tensor, float]:
    """What any text selects by itself."""
    each = [texts.scaled(part) for part in texts.parts()]
    importance = add_scores(each, [1.0] * len(each))
    if count is None:
        keep = torch.stack([select_components(part, rho) for part in each]).any(0)
    elif 0 < rho < 1:
        keep = union_of_count(each, rho * (1 - SLACK), count)
    else:
        keep = select_count(importance, count)
    return keep, _share(importance, keep)


def _by_importance(importance: Tensor, rho: float, count: int | None) -> tuple[Tensor, float]:
    keep = select_components(importance, rho) if count is None else select_count(importance, count)
    return keep, _share(importance, keep)


def _by_directions(
    weight: Tensor, curvature: LayerCurvature, number: Callable[[int, tuple[int, int]], int], rho: float
) -> Selection:
    """The leading singular directions of the weight."""
    n_kept = number(_original_count(curvature, rho), (weight.shape[0], weight.shape[1]))
    u, sigma, v = curvature.singular(weight)
    energy = sigma.double() ** 2
    mass = (energy[:n_kept].sum() / energy.sum()).item() if energy.any() else 1.0
    return Selection(lambda dtype: (u[:, :n_kept] * sigma[:n_kept]) @ v[:n_kept], n_kept, min(weight.shape), mass)


def _part(c: Tensor, keep: Tensor, basis: Basis, dtype: torch.dtype) -> Tensor:
    return suppress(c, keep, basis.G.vectors, basis.A.vectors, dtype)


def _original_count(curvature: LayerCurvature, rho: float) -> int:
    return int(select_products(curvature.general.G.values, curvature.general.A.values, rho).sum())


def _share(importance: Tensor, keep: Tensor) -> float:
    total = importance.sum()
    return ((importance * keep).sum() / total).item() if total else 1.0
