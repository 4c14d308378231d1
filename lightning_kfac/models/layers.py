"""Kinds of layers, and all layers of a model.

A further kind (a convolution, say) is one more subclass of ``Layer`` in ``KINDS``.
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from lightning_kfac.models.experts import ExpertLayer
from lightning_kfac.models.fused import FusedRows
from lightning_kfac.models.layer import Layer


class Conv1DLayer(Layer):
    """GPT-2's ``Conv1D``, whose weight is transposed."""

    of = Conv1D

    @override
    def matrix(self, stored: Tensor) -> Tensor:
        return self.part(stored).T

    @override
    def described(self) -> tuple[int, int]:
        module: Any = self.module
        return int(module.nf), int(module.nx)


KINDS: tuple[type[Layer], ...] = (Layer, Conv1DLayer, FusedRows, ExpertLayer)


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer of a known kind by name, in the model's own order."""
    found = (kind.find(name, module) for name, module in model.named_modules() for kind in KINDS)
    return {layer.name: layer for layers in found for layer in layers}
