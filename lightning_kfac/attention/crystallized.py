"""Crystallized attention: the strongest value vector, and as much of the residual as is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lightning_kfac.attention.decomposition import decompose, project
from lightning_kfac.attention.interface import Transform, attention_shapes, resolve_layers, transformed_attention
from lightning_kfac.attention.spectra import ResidualSpectra
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("top1", "full", "lowrank")


@dataclass(frozen=True)
class Crystallization:
    """What becomes of a layer's attention output Attn = V_{i*} + eps.

    Args:
        mode: ``top1`` V_{i*}; ``full`` V_{i*} + eps; ``lowrank`` V_{i*} + P_r P_r^T eps.
        rank: r, for ``lowrank``.
        heads: Only these query heads; the others stay as they are. None means all.

    Raises:
        InputError: An unknown mode, or a rank that is missing, negative or not asked for.

    Example:
        >>> Crystallization("lowrank", rank=4)
        Crystallization(mode='lowrank', rank=4, heads=None)
    """

    mode: Literal["top1", "full", "lowrank"] = "top1"
    rank: int | None = None
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}; choose from {', '.join(MODES)}")
        if (self.mode == "lowrank") != (self.rank is not None):
            raise InputError(f"mode {self.mode} with rank {self.rank}: lowrank needs a rank, the others take none")
        if self.rank is not None and self.rank < 0:
            raise InputError(f"the rank is {self.rank}; it must be 0 or more")


@contextmanager
def crystallize(
    model: "PreTrainedModel", layers: Mapping[int, Crystallization], spectra: ResidualSpectra | None = None
) -> Iterator[None]:
    """While the block runs, the attention of some layers is crystallized; then it is as before, also after an error.

    Args:
        model: A Hugging Face causal language model.
        layers: What to do, by layer number (negative from the end). Layers not named stay as they are.
        spectra: Residuals of this very model; ``lowrank`` takes its directions from them.

    Raises:
        InputError: A layer or head does not exist, a rank is above the width of a head, spectra are missing or those
            of another model, or the architecture does not support the attention interface.

    Example:
        >>> import torch
        >>> from lightning_kfac.loading import load_model
        >>> model, tokens = load_model("demo"), torch.arange(50)[None]
        >>> untouched = model(tokens).logits
        >>> with crystallize(model, {4: Crystallization("top1"), 5: Crystallization("full")}):
        ...     torch.equal(model(tokens).logits, untouched)
        False
        >>> torch.equal(model(tokens).logits, untouched)
        True
    """
    shapes = attention_shapes(model)
    chosen = {resolve_layers([layer], shapes)[0]: setting for layer, setting in layers.items()}
    if any(setting.mode == "lowrank" for setting in chosen.values()):
        if spectra is None:
            raise InputError("lowrank needs residual spectra: collect them with collect_residuals")
        spectra.check_model(model)
    transforms = {}
    for layer, setting in chosen.items():
        heads, width = shapes[layer]
        if missing := [head for head in setting.heads or () if not 0 <= head < heads]:
            raise InputError(f"layer {layer} has heads 0 to {heads - 1}, no head {missing[0]}")
        directions = None
        if spectra is not None and setting.rank is not None:
            check_rank(setting.rank, width, layer)
            directions = _directions(spectra, layer, setting.rank)
        transforms[layer] = _transform(setting, directions)
    with transformed_attention(model, transforms):
        yield


def _transform(setting: Crystallization, directions: Tensor | None) -> Transform:
    def crystallized(output: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        ground, residual = decompose(output, probabilities, values)
        if setting.mode == "full":
            ground = ground + residual
        elif directions is not None:
            ground = ground + project(residual, directions)
        return _in_heads(setting.heads, ground.to(output.dtype), output)

    return crystallized


def _in_heads(heads: Sequence[int] | None, changed: Tensor, output: Tensor) -> Tensor:
    """``changed`` in the given heads, ``output`` in the others. Both [B, T, H, d]."""
    if heads is None:
        return changed
    mixed = output.clone()
    mixed[:, :, list(heads)] = changed[:, :, list(heads)]
    return mixed


def _directions(spectra: ResidualSpectra, layer: int, rank: int) -> Tensor:
    """P_r [H, d, r] of a layer."""
    if layer not in spectra:
        raise InputError(f"the residual spectra have layers {', '.join(map(str, spectra))}, not layer {layer}")
    return spectra[layer].directions(rank)


def check_rank(rank: int, width: int, layer: int) -> None:
    """Raises ``InputError`` for a rank above the width of a head."""
    if rank > width:
        raise InputError(f"rank {rank} is above {width}, the width of a head in layer {layer}")
