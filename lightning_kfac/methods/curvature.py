"""The curvature edit as one method among others."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.methods.method import Method, Needs


@dataclass(frozen=True)
class CurvatureEdit(Method):
    """Keeps what a formula ranks highest (``editing/formulas.py``).

    Args:
        formula: Of the ranking.
        rho: Share of its mass that is kept.
        seed: Of the formula ``random``.
    """

    name: ClassVar[str] = "formula"
    strength: ClassVar[str] = "rho"
    falling: ClassVar[bool] = True
    needs: ClassVar[Needs] = "curvature"

    formula: str = "original"
    rho: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> EditConfig:
        """The edit; raises ``InputError`` for a formula or a share that it cannot be."""
        return EditConfig(rho=self.rho, formula=self.formula, seed=self.seed)

    @property
    @override
    def label(self) -> str:
        return f"K-FAC, {self.formula}"
