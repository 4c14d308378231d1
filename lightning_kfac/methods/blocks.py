"""Edits of a block of the curvature basis: delete it, add noise to it, or step against what recites within it."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.editing.curvature import Basis
from lightning_kfac.errors import InputError
from lightning_kfac.math.unlearning import block_part, trailing
from lightning_kfac.methods.method import Needs, WeightMethod, check_range, unit

QUINTILES = 5


@dataclass(frozen=True)
class _BlockMethod(WeightMethod):
    """Acts on a block of the basis.

    Args:
        block: ``flattest`` and ``head``: the last and the first ``share`` of the directions on each side, by
            eigenvalue; ``quintile``: the fifths that ``quintile`` names.
        share: Of the directions on each side, in [0, 1].
        quintile: Which fifth of G's directions and which of A's, from 1 (the largest eigenvalues) to 5.
    """

    strength: ClassVar[str] = "share"
    needs: ClassVar[Needs] = "curvature"

    share: float = 0.6
    block: Literal["flattest", "head", "quintile"] = "flattest"
    quintile: tuple[int, ...] = (5, 5)

    def __post_init__(self) -> None:
        check_range(self.name, "share", self.share, 0, 1)
        if len(self.quintile) != 2 or not all(1 <= q <= QUINTILES for q in self.quintile):
            raise InputError(
                f"methods: {self.name}: quintile is {list(self.quintile)}; name two numbers from 1 to 5", "methods"
            )

    @override
    def about(self) -> dict[str, object]:
        unused = "share" if self.block == "quintile" else "quintile"
        return {key: value for key, value in super().about().items() if key != unused}

    @property
    @override
    def label(self) -> str:
        block = f"quintile {'x'.join(map(str, self.quintile))}" if self.block == "quintile" else self.block
        return f"{super().label}, {block}"

    @property
    @override
    def amount(self) -> float:
        return 1 / QUINTILES if self.block == "quintile" else self.share

    def part(self, W: Tensor, basis: Basis) -> Tensor:
        """What W has in the block. [d_out, d_in]."""
        rows, columns = (self._directions(n, side) for side, n in enumerate(W.shape))
        return block_part(W, basis.G.vectors, basis.A.vectors, rows, columns)

    def _directions(self, n: int, side: int) -> slice:
        if self.block == "quintile":
            number = self.quintile[side]
            return slice(round((number - 1) * n / QUINTILES), round(number * n / QUINTILES))
        return trailing(n, self.share) if self.block == "flattest" else slice(0, round(self.share * n))


@dataclass(frozen=True)
class BlockDeletion(_BlockMethod):
    """Sets a block of the components to zero."""

    name: ClassVar[str] = "block_deletion"

    @override
    def changed(self, W: Tensor, basis: Basis, layer: str, M: Tensor | None) -> Tensor:
        return W - self.part(W, basis)


@dataclass(frozen=True)
class BlockNoise(_BlockMethod):
    """Adds normal noise to a block of the components, with the block's own norm: is it the direction, or the size?

    Args:
        seed: Of the noise, which depends on nothing else but the layer's name and the block.
    """

    name: ClassVar[str] = "block_noise"

    seed: int = 0

    @override
    def changed(self, W: Tensor, basis: Basis, layer: str, M: Tensor | None) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {layer}".encode()).digest()[:8], "big") >> 1
        drawn = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noise = self.part(drawn.to(W), basis)
        size = torch.linalg.vector_norm(noise)
        return W + noise * (torch.linalg.vector_norm(self.part(W, basis)) / size) if size > 0 else W


@dataclass(frozen=True)
class CoherentStep(WeightMethod):
    """W' = W - nu P / ||P|| with P = G_s G_s^T M A_s A_s^T: a step against the summed margins of the forget set, within
    the flattest directions.

    M is the sum over its suffix tokens of d m_t / d W, m_t the logit of the token less the largest other one.

    Args:
        nu: Frobenius norm of the step in each layer.
        share: Of the directions on each side that it may use, the flattest ones.
    """

    name: ClassVar[str] = "coherent_step"
    strength: ClassVar[str] = "nu"
    needs: ClassVar[Needs] = "curvature and forget set"

    nu: float = 1.0
    share: float = 0.6

    def __post_init__(self) -> None:
        check_range(self.name, "nu", self.nu, 0)
        check_range(self.name, "share", self.share, 0, 1)

    @override
    def changed(self, W: Tensor, basis: Basis, layer: str, M: Tensor | None) -> Tensor:
        if M is None:
            raise RuntimeError("the coherent step needs the gradient of the margins")
        rows, columns = (trailing(n, self.share) for n in W.shape)
        P = block_part(M.to(W), basis.G.vectors, basis.A.vectors, rows, columns)
        return W - self.nu * unit(P, layer)
