"""EditConfig: what to edit and how."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning_kfac.editing.formulas import FORMULAS, FormulaName, described
from lightning_kfac.errors import InputError
from lightning_kfac.math.selection import check_rho
from lightning_kfac.models.choices import Blocks, Projections, block_choice, projection_choice
from lightning_kfac.models.targets import block_of, projection_of

Mode = Literal["suppress", "ablate"]
Budget = Literal["mass", "count"]
Mix = Literal["scores", "union", "factors"]
Basis = Literal["general", "mixed"]
Normalize = Literal["mass", "none"]
ExpertInputs = Literal["own", "layer"]


@dataclass(frozen=True)
class EditConfig:
    """What to edit and how.

    Args:
        rho: Share of the curvature mass to keep in each layer, in [0, 1].
        formula: What ranks the components: FORMULAS.
        rho_G, rho_A: Of the formula ``rectangle``: the share of each side's spectrum; by default rho.
        blocks: Edit only these blocks (negative from the end); by default all that have factors.
        projections: Edit only these projections; by default all that have factors.
        layers: Instead of blocks and projections: a rho for each, as in ``{"31": {"gate": 0.8, "up": 0.9}}``;
            in place of a rho a mapping with ``rho`` and ``formula``.
        mode: ``suppress`` keeps the top components and drops the rest, ``ablate`` drops the top ones.
        budget: ``mass`` keeps a share rho of the importance; ``count`` keeps as many components as
            ``original`` (with a domain: as the same formula without one) keeps at rho. By default mass,
            for controls and with a domain count.
        alpha: Weight of a domain's curvature, or of each domain by name. 0 leaves a domain out.
        mix: How domains enter: ``scores`` adds their importance, ``union`` keeps what either selects at rho,
            ``factors`` adds A and G, each divided by its trace.
        basis: Of the mix: ``general`` (default) or ``mixed``, that of the added factors.
        normalize: ``mass`` scales each corpus's curvature to total 1 before it is added, ``none`` does not.
        seed: Of the formula ``random``.
        expert_min_tokens: An expert that fewer tokens came to is left as it is and listed; by default the larger of
            its d_in and d_out: its covariances have no more directions than tokens.
        expert_inputs: ``layer`` edits such an expert all the same (if any token came), with the A of all experts of its
            block in place of its own.

    Raises:
        InputError: A number is out of range, a name is unknown, or two options exclude each other.

    Example:
        >>> EditConfig(rho=0.7).formula
        'original'
    """

    rho: float = 0.6
    formula: FormulaName = "original"
    blocks: Blocks = "all"
    projections: Projections | None = None
    layers: dict[str, dict[str, float | dict[str, Any]]] | None = None
    mode: Mode = "suppress"
    budget: Budget | None = None
    alpha: float | dict[str, float] = 1.0
    mix: Mix = "scores"
    basis: Basis | None = None
    normalize: Normalize = "mass"
    seed: int = 0
    expert_min_tokens: int | None = None
    expert_inputs: ExpertInputs = "own"
    rho_G: float | None = None
    rho_A: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", block_choice(self.blocks))
        object.__setattr__(self, "projections", projection_choice(self.projections))
        check_rho(self.rho)
        for name, kind in (
            ("mode", Mode),
            ("budget", Budget),
            ("mix", Mix),
            ("basis", Basis),
            ("normalize", Normalize),
            ("expert_inputs", ExpertInputs),
        ):
            value = getattr(self, name)
            if value not in get_args(kind) and not (value is None and name in ("budget", "basis")):
                raise InputError(f"unknown {name} {value!r}; choose from {', '.join(get_args(kind))}")
        if self.formula not in FORMULAS:
            raise InputError(f"unknown formula {self.formula!r}; choose from {', '.join(FORMULAS)}")
        self._check_formula()
        if self.mix == "factors" and self.basis == "general":
            raise InputError("mix factors makes a basis of its own; leave basis out, or say mixed")
        for value in self.alpha.values() if isinstance(self.alpha, Mapping) else [self.alpha]:
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"alpha is {value}; it is a weight and must be 0 or more")
        if self.expert_min_tokens is not None and not self.expert_min_tokens >= 0:
            raise InputError(f"expert_min_tokens is {self.expert_min_tokens}; it must not be negative")
        self._check_layers()

    @property
    def sides(self) -> tuple[float, float]:
        """The shares of a rectangle: of G and of A."""
        return (
            self.rho if self.rho_G is None else self.rho_G,
            self.rho if self.rho_A is None else self.rho_A,
        )

    def _check_formula(self) -> None:
        formula = FORMULAS[self.formula]
        if self.budget == "mass" and not formula.mass:
            raise InputError(f"formula {self.formula} has no mass to keep a share of; use budget count")
        if formula.rectangle and self.budget is not None:
            raise InputError("formula rectangle keeps a share of each side; leave budget out")
        for name, value in (("rho_G", self.rho_G), ("rho_A", self.rho_A)):
            if value is None:
                continue
            if not formula.rectangle and self.layers is None:
                raise InputError(f"{name} is of the formula rectangle alone; leave it out")
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; it is a share of one side's spectrum and must lie in [0, 1]")

    def for_layer(self, name: str) -> "EditConfig":
        """What holds for one layer: its own rho and formula where ``layers`` gives them.

        Raises:
            InputError: ``layers`` does not name it.
        """
        if self.layers is None:
            return self
        rules = self.layers.get(str(block_of(name)), {})  # keys are text, see _check_layers
        projection = projection_of(name)
        if projection is None or projection not in rules:
            raise InputError(f"layers does not name {name}")
        return replace(self, layers=None, **_fields(rules[projection]))

    def alpha_of(self, domain: str) -> float:
        """The weight of a domain.

        Raises:
            InputError: ``alpha`` is a mapping that does not name it.
        """
        if not isinstance(self.alpha, Mapping):
            return float(self.alpha)
        if domain not in self.alpha:
            raise InputError(f"alpha names {', '.join(self.alpha) or 'no domain'}, not the domain {domain!r}")
        return float(self.alpha[domain])

    def check_mixing(self) -> None:
        """Raises ``InputError`` where domains cannot enter this edit."""
        formula = FORMULAS[self.formula]
        if self.expert_inputs == "layer":
            raise InputError("expert_inputs layer takes no domain; leave one of them out")
        if formula.curvature is None:
            what = "is a control and" if formula.control else "has no curvature that is added up: it"
            raise InputError(f"formula {self.formula} {what} takes no domain; leave the domain out")
        if self.mode == "ablate":
            raise InputError("mode ablate removes the top curvature of the factors given: give the domain's alone")
        if "moments" in formula.needs and (self.mix == "factors" or self.basis == "mixed"):
            raise InputError(
                f"formula {self.formula} was measured in the general basis; with a domain use mix scores or union"
            )
        if self.mix == "factors" and not formula.mixes_factors:
            raise InputError(
                f"mix factors adds up A and G, of which formula {self.formula} is not made; use mix scores or union"
            )

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if self.blocks != "all" or self.projections is not None:
            raise InputError("layers names blocks and projections itself: leave blocks and projections out")
        example = '{"31": {"gate": 0.8, "up": 0.8}}'
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise InputError(f"layers must be a mapping such as {example}")
        # YAML gives numbers where JSON gives text.
        layers = {str(int(b)) if str(b).isdigit() else b: chosen for b, chosen in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        for block, chosen in layers.items():
            if not str(block).isdigit() or not isinstance(chosen, Mapping) or not chosen:
                raise InputError(f"layers: block {block!r} must be a number with projections below it, as in {example}")
            for projection, rule in chosen.items():
                where = f"layers: block {block}, {projection}"
                if isinstance(rule, Mapping) and (unknown := [key for key in rule if key not in ("rho", "formula")]):
                    raise InputError(f"{where}: unknown field {unknown[0]!r}; known are rho and formula")
                try:
                    replace(self, layers=None, **_fields(rule))
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None


def _fields(rule: float | Mapping[str, Any]) -> dict[str, Any]:
    return dict(rule) if isinstance(rule, Mapping) else {"rho": rule}


if EditConfig.__doc__:  # not under python -OO
    EditConfig.__doc__ = EditConfig.__doc__.replace("FORMULAS", described())
