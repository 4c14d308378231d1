"""The curvature of one layer: eigenbases, and what an edit asks of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.factors.kronecker import KroneckerFactors, pooled_input
from lightning_kfac.factors.moments import load_moments
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


@dataclass(frozen=True)
class Sources:
    """What is known of the curvature of a model's layers, by dotted name.

    Attributes:
        factors: Of the general text.
        bases: Where eigenbases are kept.
        domains: Factors of each domain, by its name.
        moments: Measured curvature [d_out, d_in] in the bases of ``factors``; None if it may lie beside them.
        domain_moments: The same of each domain.
    """

    factors: Mapping[str, KroneckerFactors]
    bases: BasisCache
    domains: Mapping[str, Mapping[str, KroneckerFactors]] = field(default_factory=dict)
    moments: Mapping[str, Tensor] | None = None
    domain_moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def of(self, domain: str | None) -> Mapping[str, KroneckerFactors]:
        """Factors of the general text (None) or of a domain."""
        return self.factors if domain is None else self.domains[domain]

    def moments_of(self, name: str, domain: str | None) -> Tensor | None:
        """Measured curvature of a layer, if there is any."""
        given = self.moments if domain is None else self.domain_moments.get(domain)
        folder = self.of(domain)
        if given is None and isinstance(folder, FactorFolder):
            return load_moments(folder.path, self.factors, self.bases, name)
        return (given or {}).get(name)


class LayerCurvature:
    """One layer's curvature in the forms that an edit needs; made when asked for.

    Args:
        name: The layer's dotted name.
        sources: Of all layers.
        device: Where to compute.
        repeated: Remember what further edits of the same weight will need again, and is small.
        pool: Experts whose A are averaged, in place of the layer's own.
    """

    def __init__(
        self,
        name: str,
        sources: Sources,
        device: torch.device,
        repeated: bool = False,
        pool: tuple[str, ...] | None = None,
    ):
        self.name = name
        self.pool = pool
        self.sources = sources
        self.device = device
        self.repeated = repeated
        self._components: Tensor | None = None
        self._singular: tuple[Tensor, Tensor, Tensor] | None = None
        self._along: dict[tuple[str | None, str], tuple[Tensor, Tensor]] = {}

    @cached_property
    def general(self) -> Basis:
        """The basis of the general text's factors."""
        own = Basis(*self.sources.bases.of(self.sources.factors, self.name, self.device))
        return own if self.pool is None else own._replace(A=self._pooled(self.pool))

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
            U, sigma, V = self._singular
            return U.to(self.device), sigma.to(self.device), V.to(self.device)
        U, sigma, V = torch.linalg.svd(weight, full_matrices=False)
        if self.repeated:
            self._singular = U.cpu(), sigma.cpu(), V.cpu()
        return U, sigma, V

    def measured(self, domain: str | None = None) -> Tensor:
        """Moments of the general text or of a domain; raises ``InputError`` where there are none."""
        if self.pool is not None:
            raise InputError("moments are measured in the basis of an expert's own A; use expert_inputs own")
        moments = self.sources.moments_of(self.name, domain)
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

    def coupled(self, basis: Basis, domain: str | None = None) -> tuple[Tensor, Tensor]:
        """Row and column sums of the moments in any basis, from the coupled factors: float64 [d_out], [d_in].

        The token moments m_ij = E[(u_i^T g)^2 (v_j^T a)^2] have the row sums E[(u_i^T g)^2 ||a||^2], since the columns
        of a basis are complete.

        Raises:
            InputError: They were not collected.
        """
        if self.pool is not None:
            raise InputError("coupled factors are of an expert's own inputs; use expert_inputs own")
        kept = (domain, "coupled")
        if basis is self.general and kept in self._along:
            return self._along[kept]
        factors = self.sources.of(domain)[self.name]
        if factors.G_coupled is None or factors.A_coupled is None:
            of = "" if domain is None else f" of the domain {domain}"
            raise InputError(
                f"this formula needs coupled factors{of}: collect with collect.coupled true, or from Python with "
                "collect_factors(coupled=True)",
                "collect.coupled",
            )
        rows = curvature_along(factors.G_coupled.to(self.device), basis.G.vectors)
        columns = curvature_along(factors.A_coupled.to(self.device), basis.A.vectors)
        if basis is self.general and self.repeated:
            self._along[kept] = rows, columns
        return rows, columns

    def inputs(self, basis: Basis, domain: str | None = None) -> Tensor:
        """mu_j = v_j^T A v_j of the general text or a domain, in any basis. float64 [d_in]."""
        if domain is None and basis is self.general:
            return basis.A.values
        return curvature_along(self.sources.of(domain)[self.name].A.to(self.device), basis.A.vectors)

    def product(self, basis: Basis, domain: str | None = None) -> Tensor:
        """S_ij = (u_i^T G u_i)(v_j^T A v_j) of the general text or a domain, in any basis. float64 [d_out, d_in]."""
        if domain is None and basis is self.general:
            return original(basis.G.values, basis.A.values)
        in_general = basis is self.general
        kept = (domain, "product")
        if in_general and kept in self._along:
            return original(*self._along[kept])
        factors = self.sources.of(domain)[self.name]
        along_G = curvature_along(factors.G.to(self.device), basis.G.vectors)
        along_A = curvature_along(factors.A.to(self.device), basis.A.vectors)
        if in_general and self.repeated:
            self._along[kept] = along_G, along_A
        return original(along_G, along_A)

    def mixed(self, alphas: Mapping[str, float]) -> Basis:
        """The basis of the factors added up, each divided by its trace."""
        layers = [self.sources.of(domain)[self.name] for domain in (None, *alphas)]
        weights = [1.0, *alphas.values()]
        G = self._spectrum("G", [layer.G for layer in layers], weights)
        A = self._spectrum("A", [layer.A for layer in layers], weights)
        return Basis(G, A)

    def _pooled(self, pool: tuple[str, ...]) -> Spectrum:
        what = f"A of the experts beside {self.name}"
        mean = partial(pooled_input, self.sources.factors, pool)
        return self.sources.bases.spectrum(None, lambda: mean().to(self.device), what, self.device)

    def _spectrum(self, side: str, matrices: list[Tensor], weights: list[float]) -> Spectrum:
        what = f"{side} of {self.name}, mixed"
        return self.sources.bases.spectrum(
            None, lambda: add_factors([matrix.to(self.device) for matrix in matrices], weights), what, self.device
        )
