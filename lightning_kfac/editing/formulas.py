"""The formulas that an edit can rank the parts of a weight by: one record each, and everything else follows from it.

With the eigenbases G = U_G diag(lambda) U_G^T and A = U_A diag(mu) U_A^T, the weight's components are C = U_G^T W U_A.
A formula gives their importance S [d_out, d_in]; an edit keeps those with the largest S. Choices on the command line,
help, checks, sweeps and the order of figures are read off ``FORMULAS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lightning_kfac.editing.curvature import Basis, LayerCurvature
from lightning_kfac.math.importance import coupled, modified, original, random

Need = Literal["moments", "coupled"]


@dataclass(frozen=True)
class Formula:
    """One way to rank the parts of a weight.

    Attributes:
        name: What users call it.
        text: S_ij in a few words, for help.
        source: Where it comes from.
        score: Gives S from the layer's curvature, what is ranked [d_out, d_in] (C, or W where ``entries``) and a seed.
            float64 [d_out, d_in].
        curvature: The part of S that is added up over domains, before any factor C^2, in any basis: of the general text
            (None) or a domain. float64 [d_out, d_in]. Controls have none and take no domain.
        squared: S is that part times C^2.
        product: S is lambda_i mu_j, from which can be selected without making it.
        needs: What must have been measured beside A and G.
        mass: S is a mass of which a share rho can be kept; otherwise only a number is.
        least: What S ranks last is kept.
        seeded: S depends on a seed.
        entries: S ranks the entries of W itself, in no basis.
        directions: Instead of components, the leading singular directions are kept: how many, from the number of
            components that ``original`` keeps and the weight's shape.
        rectangle: The leading directions on each side are kept, those that hold a share of either spectrum.
    """

    name: str
    text: str
    source: str
    score: Callable[[LayerCurvature, Tensor, int], Tensor] | None = None
    curvature: Callable[[LayerCurvature, Basis, str | None], Tensor] | None = None
    squared: bool = False
    product: bool = False
    needs: tuple[Need, ...] = ()
    mass: bool = True
    least: bool = False
    seeded: bool = False
    entries: bool = False
    directions: Callable[[int, tuple[int, int]], int] | None = None
    rectangle: bool = False

    @property
    def control(self) -> bool:
        """What a sceptic compares with: knows nothing of curvature, or turns it round."""
        return self.curvature is None and not self.rectangle

    @property
    def mixes_factors(self) -> bool:
        """Whether S can be read off factors that are added up, from their spectra alone."""
        return self.curvature is _product

    @property
    def counted(self) -> bool:
        """Whether this is the formula whose number of components a ``count`` is."""
        return self.name == "original"

    @property
    def budget(self) -> Literal["mass", "count"]:
        """What is kept by default: a share rho of S, or as many components as ``original`` keeps at rho."""
        return "count" if self.control else "mass"

    def importance(self, layer: LayerCurvature, ranked: Tensor, seed: int) -> Tensor:
        """S of the general text. float64 [d_out, d_in].

        Args:
            layer: The layer's curvature.
            ranked: What is ranked, as for ``score``.
            seed: Where the formula is ``seeded``.
        """
        if self.score is not None:
            return self.score(layer, ranked, seed)
        return self.scaled(self.part(layer, layer.general, None), ranked)

    def part(self, layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
        """``curvature`` of the general text (None) or a domain; raises ``RuntimeError`` where the formula has none."""
        if self.curvature is None:
            raise RuntimeError(f"formula {self.name} is a control: it has no curvature that is added up over domains")
        return self.curvature(layer, basis, domain)

    def scaled(self, curvature: Tensor, c: Tensor) -> Tensor:
        """S from its curvature part, with the factor C^2 where the formula has it. float64 [d_out, d_in]."""
        return modified(curvature, c) if self.squared else curvature


def _product(layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
    return layer.product(basis, domain)


def _measured(layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
    return layer.measured(domain)


def _coupled(layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
    return coupled(*layer.coupled(basis, domain))


def _output_side(layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
    rows, columns = layer.coupled(basis, domain)
    return rows[:, None].expand(len(rows), len(columns))


def _input_side(layer: LayerCurvature, basis: Basis, domain: str | None) -> Tensor:
    return layer.inputs(basis, domain).expand(len(basis.G.values), -1)


def _noise(layer: LayerCurvature, c: Tensor, seed: int) -> Tensor:
    return random((c.shape[0], c.shape[1]), seed, layer.name).to(c.device)


def _square(layer: LayerCurvature, ranked: Tensor, seed: int) -> Tensor:
    return ranked.double() ** 2


def _of_general(layer: LayerCurvature, c: Tensor, seed: int) -> Tensor:
    return original(layer.general.G.values, layer.general.A.values)


def _same_share(count: int, shape: tuple[int, int]) -> int:
    return round(count / (shape[0] * shape[1]) * min(shape))


def _same_parameters(count: int, shape: tuple[int, int]) -> int:
    whole = count >= shape[0] * shape[1]
    return min(shape) if whole else min(*shape, round(count / sum(shape)))


_RECORDS = (
    Formula(
        "original",
        "lambda_i mu_j",
        "K-FAC curvature (Martens and Grosse, 2015) as arXiv 2510.24256 uses it",
        curvature=_product,
        product=True,
    ),
    Formula(
        "modified",
        "lambda_i mu_j C_ij^2",
        "the loss that removing (i, j) costs to second order: saliency of Optimal Brain Damage (LeCun et al., 1990)",
        curvature=_product,
        squared=True,
    ),
    Formula(
        "corrected",
        "m_ij, the curvature measured in the basis",
        "EK-FAC (George et al., 2018)",
        curvature=_measured,
        needs=("moments",),
    ),
    Formula(
        "corrected_modified",
        "m_ij C_ij^2",
        "both of the above",
        curvature=_measured,
        squared=True,
        needs=("moments",),
    ),
    Formula(
        "coupled",
        "r_i c_j / sum r, with r and c the row and column sums of m_ij, collected in the same pass as A and G",
        "coupled factors: G_coupled = E[||a||^2 g g^T], A_coupled = E[||g||^2 a a^T] (public journal of the repository "
        "smarter/memorization_kfac); m_ij of rank one",
        curvature=_coupled,
        needs=("coupled",),
    ),
    Formula(
        "coupled_modified",
        "the same times C_ij^2",
        "both of the above",
        curvature=_coupled,
        squared=True,
        needs=("coupled",),
    ),
    Formula(
        "output_side",
        "r_i C_ij^2",
        "the outputs' side of the coupled factors alone (the same journal)",
        curvature=_output_side,
        squared=True,
        needs=("coupled",),
    ),
    Formula(
        "foof",
        "mu_j",
        "inputs alone: FOOF (Benzing, 2022, arXiv 2201.12250)",
        curvature=_input_side,
    ),
    Formula(
        "rectangle",
        "the leading directions of G and of A, by a share of each spectrum",
        "rectangular truncation, as the original tool of arXiv 2510.24256 has it",
        mass=False,
        rectangle=True,
    ),
    Formula(
        "random",
        "uniform noise",
        "control: as many components, none preferred",
        score=_noise,
        mass=False,
        seeded=True,
    ),
    Formula(
        "magnitude",
        "C_ij^2",
        "control: the basis without the curvature",
        score=_square,
    ),
    Formula(
        "weights",
        "W_ij^2",
        "control: no basis (magnitude pruning)",
        score=_square,
        entries=True,
    ),
    Formula(
        "lowest",
        "-lambda_i mu_j",
        "control: original from the other end",
        score=_of_general,
        mass=False,
        least=True,
    ),
    Formula(
        "svd",
        "sigma_k^2, by share",
        "control: the leading singular directions, the same share of directions as original keeps of components",
        mass=False,
        directions=_same_share,
    ),
    Formula(
        "svd_parameters",
        "sigma_k^2, by parameters",
        "control: as many directions as have the parameter count of the components that original keeps",
        mass=False,
        directions=_same_parameters,
    ),
)
FORMULAS: dict[str, Formula] = {record.name: record for record in _RECORDS}
# The choices of a command line; what it is given is checked against the records.
if TYPE_CHECKING:
    FormulaName = str
else:
    FormulaName = Literal[tuple(FORMULAS)]


def described() -> str:
    """All formulas in one sentence, for the help of an option."""
    own = [f"``{f.name}`` {f.text}" for f in FORMULAS.values() if not f.control]
    controls = [f"``{f.name}`` {f.text}" for f in FORMULAS.values() if f.control]
    return f"{'; '.join(own)}; or a control: {'; '.join(controls)}"


def is_product(name: str) -> bool:
    """Whether the kept set of a formula is a staircase in the two spectra; of a name that is not known, no."""
    return name in FORMULAS and FORMULAS[name].product
