"""The curvature of one layer: eigenbases, and what an edit asks of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.importance import (
    components,
    curvature_along,
    original,
)
from lightning_kfac.math.mixing import add_factors
from lightning_kfac.math.spectrum import Spectrum


class Basis(NamedTuple):
    """A curvature basis: eigenvectors of G [d_out, d_out] and A [d_in, d_in]."""

    G: Spectrum
    A: Spectrum


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
                f"the corrected formulas need moments{of} measured in the basis of these factors: collect with "
                "collect.moments token, or from Python with collect_moments",
                "collect.moments",
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
