"""Kinds of layers: how to read and write a weight as W [d_out, d_in]."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight_matrix(module: nn.Module) -> Tensor:
    """The layer's weight as W [d_out, d_in] with z = W a; a view, also of a transposed Conv1D weight."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
