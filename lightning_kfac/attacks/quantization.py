"""Quantization: small changes of weights may not survive a coarse grid, and an edit may be undone by it.

Fake quantization: weights are rounded to the values that a quantized model would have, and kept in their dtype. Scales
are float32 and not quantized themselves; activations are left alone. Of an unlearned model that kept 21 % of what it
should forget, 4 bits brought back 83 % (Zhang et al., 2024, arXiv 2410.16454).
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_kfac.attacks.attack import WeightAttack
from lightning_kfac.errors import InputError

Scheme = Literal["int8", "int4", "nf4"]
# Of a row, as they are published: int8 with a scale for each output channel, int4 for 128 inputs, NF4 for 64.
GROUPS: dict[Scheme, int | None] = {"int8": None, "int4": 128, "nf4": 64}
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantization(WeightAttack):
    """Rounds every linear layer but the head to a grid.

    Args:
        scheme: ``int8`` and ``int4``: whole numbers from -127 to 127, or -7 to 7, times a scale for each group, rounded
            to the nearest, with the largest weight of the group on the outermost value. ``nf4``: the 16 values of
            NormalFloat (Dettmers et al., 2023, arXiv 2305.14314) times the largest weight of the group.
        group: Neighbouring inputs of one output that share a scale; by default all of them for int8, 128 for int4, 64
            for nf4. Where groups do not divide the row, the last is shorter.
    """

    name: ClassVar[str] = "quantization"

    scheme: Scheme = "int4"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.scheme not in GROUPS:
            raise InputError(f"attacks: scheme is {self.scheme!r}; choose from {', '.join(GROUPS)}")
        if self.group is not None and self.group < 1:
            raise InputError(f"attacks: group is {self.group}; it must be at least 1")

    @property
    @override
    def label(self) -> str:
        group = self.group or GROUPS[self.scheme]
        return f"{self.scheme}, " + ("per channel" if group is None else f"groups of {group}")

    @override
    def changed(self, W: Tensor, layer: str) -> Tensor:
        group = self.group or GROUPS[self.scheme]
        return nf4(W, group or W.shape[1]) if self.scheme == "nf4" else rounded(W, BITS[self.scheme], group)


def rounded(W: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The nearest multiples of each group's largest magnitude / (2^(bits - 1) - 1); halves go to the even one.

    Args:
        W: [d_out, d_in].
        bits: Of the whole numbers, which are symmetric around 0.
        group: Neighbours in a row that share a scale; None takes the row.

    Returns:
        [d_out, d_in].

    Example:
        >>> rounded(torch.tensor([[7.0, 3.4, -0.6, 0.2]]), bits=4)
        tensor([[ 7.,  3., -1.,  0.]])
    """
    groups = _in_groups(W, group or W.shape[1])
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    values = torch.where(scale > 0, (groups / scale).round() * scale, groups)
    return _in_rows(values, W.shape[1])


def nf4(W: Tensor, group: int = 64) -> Tensor:
    """The nearest of 16 values times each group's largest magnitude; of two as near the lower one.

    Args:
        W: [d_out, d_in].
        group: Neighbours in a row that share a scale.

    Returns:
        [d_out, d_in].
    """
    groups = _in_groups(W, group)
    scale = groups.abs().amax(-1, keepdim=True)
    levels = nf4_levels().to(W)
    nearest = torch.bucketize(groups / scale.where(scale > 0, 1), (levels[1:] + levels[:-1]) / 2)
    return _in_rows(levels[nearest] * scale, W.shape[1])


@cache
def nf4_levels() -> Tensor:
    """The values of NF4, float64 [16]: quantiles of a normal distribution, 8 of them above and 7 below an exact 0.

    Dettmers et al. (2023), appendix E, scaled to [-1, 1]. The outermost probability is the mean of 1 - 1/30 and
    1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    normal = NormalDist()

    def quantiles(n: int) -> list[float]:
        return [normal.inv_cdf(outermost + (0.5 - outermost) * i / n) for i in range(n)]

    values = torch.tensor([*(-q for q in quantiles(7)), 0.0, *reversed(quantiles(8))], dtype=torch.float64)
    return values / values.max()


def _in_groups(W: Tensor, group: int) -> Tensor:
    """[d_out, number of groups, group], zeros behind the last: they change no largest magnitude."""
    return F.pad(W, (0, -W.shape[1] % group)).unflatten(1, (-1, group))


def _in_rows(groups: Tensor, d_in: int) -> Tensor:
    return groups.flatten(1)[:, :d_in]
