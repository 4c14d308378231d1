"""The edit of one layer: which components stay, and the new weight. Tensors in, tensors out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.bases import BasisCache
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.errors import InputError
from lightning_kfac.factors import KroneckerFactors
from lightning_kfac.math.importance import (
    CONTROLS,
    MEASURED,
    components,
    curvature_along,
    modified,
    original,
    random,
)
from lightning_kfac.math.mixing import add_factors, add_scores, union_of_count
from lightning_kfac.math.projection import suppress
from lightning_kfac.math.selection import SLACK, select_components, select_count, select_products
from lightning_kfac.math.spectrum import Spectrum


class Basis(NamedTuple):
    """A curvature basis: eigenvectors of G [d_out, d_out] and A [d_in, d_in]."""

    G: Spectrum
    A: Spectrum


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


@dataclass
class LayerCurvature:
    """What is known of one layer's curvature, in the forms that an edit needs; made when asked for.

    Attributes:
        name: The layer's dotted name.
        factors: Gives the factors of the general text.
        bases: Where eigenbases are kept.
        read_basis: Gives the basis of the factors.
        device: Where to compute.
        moments: Gives the measured curvature [d_out, d_in] in that basis, or None.
        domains: Factors of each domain that enters the edit, by name.
        domain_moments: Their measured curvature in the general basis.
        repeated: Remember what further edits of the same weight will need again, and is small.
    """

    name: str
    factors: Callable[[], KroneckerFactors]
    bases: BasisCache
    read_basis: Callable[[], tuple[Spectrum, Spectrum]]
    device: torch.device
    moments: Callable[[], Tensor | None] = lambda: None
    domains: Mapping[str, Callable[[], KroneckerFactors]] = field(default_factory=dict)
    domain_moments: Mapping[str, Callable[[], Tensor | None]] = field(default_factory=dict)
    repeated: bool = False
    _components: Tensor | None = None
    _singular: tuple[Tensor, Tensor, Tensor] | None = None
    _along: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def general(self) -> Basis:
        """The basis of the general text's factors."""
        return Basis(*self.read_basis())

    def release(self) -> None:
        """Gives up the basis, which is large and can be read again."""
        self.__dict__.pop("general", None)

    def components(self, weight: Tensor) -> Tensor:
        """C of the weight in the general basis. [d_out, d_in]."""
        if self._components is not None:
            return self._components.to(self.device)
        c = components(weight, self.general.G.vectors, self.general.A.vectors)
        if self.repeated:
            self._components = c.cpu()
        return c

    def singular(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition of the weight: U [d_out, k], sigma [k], V^T [k, d_in], k = min(d_out, d_in)."""
        if self._singular is not None:
            return tuple(part.to(self.device) for part in self._singular)
        parts = torch.linalg.svd(weight, full_matrices=False)
        if self.repeated:
            self._singular = tuple(part.cpu() for part in parts)
        return parts

    def measured(self, domain: str | None = None) -> Tensor:
        """Moments of the general text or of a domain; raises ``InputError`` where there are none."""
        moments = (self.moments if domain is None else self.domain_moments.get(domain, lambda: None))()
        if moments is None:
            of = "" if domain is None else f" of the domain {domain}"
            raise InputError(
                f"the corrected formulas need moments{of} measured in the basis of these factors: collect_moments "
                "from Python, or train.py fit with --collect.moments token"
            )
        shape = len(self.general.G.values), len(self.general.A.values)
        if tuple(moments.shape) != shape:
            raise InputError(f"the moments are {list(moments.shape)}, the weight is {list(shape)}")
        return moments.to(self.device, torch.float64)

    def product(self, basis: Basis, domain: str | None = None) -> Tensor:
        """S_ij = (u_i^T G u_i)(v_j^T A v_j) of the general text or a domain, in any basis. float64 [d_out, d_in]."""
        if domain is None and basis is self.general:
            return original(basis.G.values, basis.A.values)
        in_general = basis is self.general
        if in_general and domain in self._along:
            return original(*self._along[domain])
        factors = self.factors() if domain is None else self.domains[domain]()
        sides = ((factors.G, basis.G), (factors.A, basis.A))
        along = tuple(curvature_along(matrix.to(self.device), side.vectors) for matrix, side in sides)
        if in_general and self.repeated:
            self._along[domain] = along
        return original(*along)

    def mixed(self, alphas: Mapping[str, float]) -> Basis:
        """The basis of the factors added up, each divided by its trace."""
        weights, spectra = [1.0, *alphas.values()], []
        for side in "GA":
            matrices = [getattr(f(), side) for f in (self.factors, *(self.domains[d] for d in alphas))]
            load = lambda matrices=matrices: add_factors([m.to(self.device) for m in matrices], weights)  # noqa: E731
            spectra.append(self.bases.spectrum(None, load, f"{side} of {self.name}, mixed", self.device))
        return Basis(*spectra)


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
