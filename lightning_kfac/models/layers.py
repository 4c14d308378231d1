"""Kinds of layers: one adapter each, through which targets, capture, memory plan, editor, bands and cost see a weight.

A layer is z = W a for every position, with W [d_out, d_in]. An adapter says where W lies in a parameter and which
vectors a and z are. A further kind (a convolution, an expert, rows of a fused weight) is one more class in ``KINDS``.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

from torch import Tensor, device, dtype, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

# Takes a layer's input and output; what it returns, if anything, takes the output's place.
See = Callable[[Tensor, Tensor], Tensor | None]


class Layer:
    """One weight W [d_out, d_in] in a model, with z = W a; this class is that of ``nn.Linear``.

    Args:
        name: The key of its factors: as a rule the module's dotted name.
        module: Where it lives.
    """

    of: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self.module = module

    @classmethod
    def find(cls, name: str, module: nn.Module) -> Iterator["Layer"]:
        """The layers of this kind that a module holds itself, without those of its children."""
        if isinstance(module, cls.of):
            yield cls(name, module)

    # -- the weight --------------------------------------------------------------------------------------

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that W lies in."""
        return self.module.get_parameter("weight")

    @property
    def parameter_name(self) -> str:
        """Its dotted name."""
        return f"{self.name}.weight"

    def part(self, stored: Tensor) -> Tensor:
        """What is this layer's own in a tensor laid out like the parameter: a view. Files keep this."""
        return stored

    def matrix(self, stored: Tensor) -> Tensor:
        """W [d_out, d_in] in a tensor that is laid out like the parameter: a view, to be read and written."""
        return self.part(stored)

    @property
    def W(self) -> Tensor:
        """W [d_out, d_in], a view of the parameter's data."""
        return self.matrix(self.parameter.data)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.W.shape
        return d_out, d_in

    @property
    def device(self) -> device:
        """Of the parameter."""
        return self.parameter.device

    @property
    def dtype(self) -> dtype:
        """Of the parameter."""
        return self.parameter.dtype

    # -- what runs through it ----------------------------------------------------------------------------

    def watch(self, see: See) -> RemovableHandle:
        """Has ``see`` called in every forward: with the input as it is (a shared one is then known) and the output."""
        return self.module.register_forward_hook(lambda module, args, output: see(args[0], output))

    def inputs(self, seen: Tensor) -> Tensor:
        """The vectors a in an input that was seen. [..., d_in]."""
        return seen

    def outputs(self, seen: Tensor) -> Tensor:
        """The vectors z, or their gradients, in an output that was seen. [..., d_out]."""
        return seen


class Conv1DLayer(Layer):
    """GPT-2's ``Conv1D``, whose weight is transposed."""

    of = Conv1D

    @override
    def matrix(self, stored: Tensor) -> Tensor:
        return self.part(stored).T


KINDS: tuple[type[Layer], ...] = (Layer, Conv1DLayer)


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer of a known kind by name, in the model's own order."""
    found = (kind.find(name, module) for name, module in model.named_modules() for kind in KINDS)
    return {layer.name: layer for layers in found for layer in layers}
