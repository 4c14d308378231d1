"""What weights may be stored in, for option parsers, which need no torch to name it."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Dtype = Literal["auto", "float32", "bfloat16"]
# Of a model that computes in float32 and whose checkpoint is narrower; an attribute survives copies of the model.
STORED = "_lightning_kfac_stored_dtype"


def mark_stored_dtype(model: "nn.Module", dtype: "torch.dtype") -> None:
    """Notes that a float32 model is written in another dtype."""
    if dtype != next(model.parameters()).dtype:
        setattr(model, STORED, dtype)


def stored_dtype(model: "nn.Module") -> "torch.dtype":
    """The dtype that a model's weights are written in: its own, unless it was read from a narrower one."""
    import torch

    own = next(model.parameters()).dtype
    return getattr(model, STORED, own) if own == torch.float32 else own


def as_stored(model: "nn.Module", values: "Tensor") -> "Tensor":
    """Values rounded to what a checkpoint of the model can hold, in their own dtype."""
    return values.to(stored_dtype(model)).to(values.dtype)
