"""What a method did to each layer: the counterpart of ``EditReport`` for ``edit.json`` and results."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_kfac.methods.method import Method
from lightning_kfac.models.targets import block_of, projection_of


@dataclass(frozen=True)
class LayerChange:
    """What was done to one layer.

    Attributes:
        norm_before, norm_after: Frobenius norms of the weight.
        relative_change: ||W' - W|| / ||W||.
    """

    name: str
    norm_before: float
    norm_after: float
    relative_change: float

    @classmethod
    def between(cls, name: str, before: Tensor, after: Tensor) -> Self:
        """Of a weight before and after, in one dtype or another."""
        norm = _norm(before.double())
        change = _norm(after.double() - before.double())
        return cls(name, norm, _norm(after.double()), change / norm if norm else 0.0)


@dataclass(frozen=True)
class MethodReport:
    """What a method did.

    Attributes:
        method: With its settings.
        layers: Those that it was given.
    """

    method: Method
    layers: list[LayerChange]

    @property
    def relative_change(self) -> float:
        """Mean over layers of ||W' - W|| / ||W||."""
        return sum(layer.relative_change for layer in self.layers) / len(self.layers)

    def summary(self) -> dict[str, Any]:
        """The field ``edit`` of a result."""
        names = [layer.name for layer in self.layers]
        return {
            **self.method.about(),
            "blocks": sorted({block for name in names if (block := block_of(name)) is not None}),
            "projections": sorted({projection for name in names if (projection := projection_of(name))}),
            "relative_change": self.relative_change,
        }

    def to_dict(self) -> dict[str, Any]:
        """For ``edit.json``."""
        return {
            "config": self.method.about(),
            "relative_change": self.relative_change,
            "layers": [asdict(layer) for layer in self.layers],
        }


def _norm(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix).item()
