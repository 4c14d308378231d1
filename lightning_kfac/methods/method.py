"""What a method is: a record of settings, one of which is its strength.

Three kinds: a formula of the curvature edit, an edit of the weights in one step, and a training. ``registry.py`` lists
them; the command ``compare`` sweeps them.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_kfac.editing.curvature import Basis
from lightning_kfac.errors import InputError

# What a method must be given beside the model.
Needs = Literal["curvature", "forget set", "curvature and forget set", "forget set and text"]


@dataclass(frozen=True)
class Method:
    """One method with its settings.

    Attributes:
        name: Of its kind, as configs and ``results.jsonl`` have it.
        strength: The setting that a sweep varies.
        falling: Whether a smaller strength suppresses more.
        needs: What it must be given.
    """

    name: ClassVar[str]
    strength: ClassVar[str]
    falling: ClassVar[bool] = False
    needs: ClassVar[Needs]

    def about(self) -> dict[str, Any]:
        """Name and settings, for ``results.jsonl``; settings without a say are left out."""
        return {"method": self.name, **asdict(self)}

    @property
    def label(self) -> str:
        """Which method this is, without its strength."""
        return self.name.replace("_", " ")

    @property
    def amount(self) -> float:
        """The strength as a number."""
        value = getattr(self, self.strength)
        return float(value)


@dataclass(frozen=True)
class WeightMethod(Method):
    """Changes one weight after the other, each by a function of it."""

    def changed(self, W: Tensor, basis: Basis, layer: str, M: Tensor | None) -> Tensor:
        """The new weight.

        Args:
            W: [d_out, d_in], in the basis's dtype and on its device.
            basis: Of the layer's curvature.
            layer: Its dotted name.
            M: Where ``needs`` has the forget set: the sum over its suffix tokens of d m_t / d W, [d_out, d_in].

        Returns:
            [d_out, d_in].
        """
        raise NotImplementedError


def check_range(method: str, name: str, value: float, least: float, most: float = float("inf")) -> None:
    """Raises ``InputError`` for a setting outside [least, most]."""
    if not least <= value <= most:
        bound = f"between {least:g} and {most:g}" if most < float("inf") else f"{least:g} or more"
        raise InputError(f"methods: {method}: {name} is {value:g}; it must be {bound}", "methods")


def unit(P: Tensor, layer: str) -> Tensor:
    """P / ||P||; raises ``InputError`` where it has no direction."""
    norm = torch.linalg.vector_norm(P)
    if not (norm > 0 and norm.isfinite()):
        raise InputError(f"methods: coherent_step: {layer}: no direction is left in the flat block; raise share")
    return P / norm
