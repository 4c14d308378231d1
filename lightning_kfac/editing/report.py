"""EditReport: what an edit did, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.models.targets import block_of, projection_of


@dataclass(frozen=True)
class LayerReport:
    """What the edit did to one layer.

    Attributes:
        n_kept, n_total: Components; for the formulas ``svd`` singular directions. Kept is what stays in the
            weight, so under ``ablate`` what was not selected.
        fraction_kept: n_kept / n_total.
        mass_kept: Share of the formula's importance in the kept components (``random`` and ``lowest``: of the
            curvature); under budget mass at least rho.
        norm_before, norm_after: Frobenius norms of the weight.
        relative_change: ||W' - W|| / ||W||.
        rho, formula: The layer's own.
    """

    name: str
    n_kept: int
    n_total: int
    fraction_kept: float
    mass_kept: float
    norm_before: float
    norm_after: float
    relative_change: float
    rho: float
    formula: str


@dataclass(frozen=True)
class EditReport:
    """What the edit did, layer by layer.

    Attributes:
        domains: Names of the domains that entered, with their alpha.
        unedited: Experts that too few tokens came to, with their number: they are as they were.

    Example:
        >>> layer = LayerReport("fc", 2, 8, 0.25, 0.7, 1.0, 0.8, 0.6, 0.7, "original")
        >>> EditReport(EditConfig(rho=0.7), [layer]).fraction_kept
        0.25
    """

    config: EditConfig
    layers: list[LayerReport]
    domains: dict[str, float] | None = None
    forced: bool = False
    unedited: dict[str, int] = field(default_factory=dict)

    @property
    def fraction_kept(self) -> float:
        """Kept components over all components of all edited layers."""
        return sum(layer.n_kept for layer in self.layers) / sum(layer.n_total for layer in self.layers)

    @property
    def mass_kept(self) -> float:
        """Mean over layers."""
        return sum(layer.mass_kept for layer in self.layers) / len(self.layers)

    @property
    def relative_change(self) -> float:
        """Mean over layers of ||W' - W|| / ||W||."""
        return sum(layer.relative_change for layer in self.layers) / len(self.layers)

    def summary(self) -> dict[str, Any]:
        """The field ``edit`` of a result."""
        config = self.config
        names = [layer.name for layer in self.layers]
        mixing = bool(self.domains)
        return {
            "formula": config.formula,
            "rho": config.rho,
            "layers": config.layers,
            "blocks": sorted({block for name in names if (block := block_of(name)) is not None}),
            "projections": sorted({projection for name in names if (projection := projection_of(name))}),
            "alpha": self.domains if mixing else None,
            "mix": config.mix if mixing else None,
            "basis": config.basis if mixing else None,
            "budget": config.budget,
            "mode": config.mode,
            "seed": config.seed if FORMULAS[config.formula].seeded else None,
            **(dict(zip(("rho_G", "rho_A"), config.sides, strict=True)) if FORMULAS[config.formula].rectangle else {}),
            "fraction_kept": self.fraction_kept,
            "mass_kept": self.mass_kept,
            "relative_change": self.relative_change,
        }

    def to_dict(self) -> dict[str, Any]:
        """For ``edit.json``."""
        averages = {
            "fraction_kept": self.fraction_kept,
            "mass_kept": self.mass_kept,
            "relative_change": self.relative_change,
        }
        return {
            "config": asdict(self.config),
            "domains": self.domains,
            "forced": self.forced,
            **averages,
            "layers": [asdict(layer) for layer in self.layers],
            "unedited": self.unedited,
        }


def edit_place(edit: Mapping[str, Any]) -> str:
    """Where an edit was made: ``3,4 gate,up``."""
    return f"{','.join(map(str, edit['blocks']))} {','.join(edit['projections'])}"


def edit_label(edit: Mapping[str, Any]) -> str:
    """The kind of an edit, without rho: ``original``, ``modified + arithmetic 0.5 (union)``; or another method."""
    if "method" in edit:
        return str(edit["method"])
    label = edit["formula"] + (" (ablate)" if edit["mode"] == "ablate" else "")
    if edit["alpha"]:
        label += " + " + ", ".join(f"{name} {alpha:g}" for name, alpha in edit["alpha"].items())
        label += f" ({edit['mix']}{', mixed basis' if edit['basis'] == 'mixed' else ''})"
    return label
