"""What a layer is: the adapter through which targets, capture, memory plan, editor, bands and cost see a weight.

A layer is z = W a for every position that comes to it, with W [d_out, d_in]. An adapter says where W lies in a
parameter and which vectors a and z are.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, device, dtype, nn
from torch.utils.hooks import RemovableHandle

from lightning_kfac.errors import InputError


class Handle(Protocol):
    """What ends a watch."""

    def remove(self) -> None:
        """Ends it."""


class See(Protocol):
    """Is shown what runs through a layer."""

    def __call__(self, a: Tensor, z: Tensor, positions: Tensor | None = None) -> Tensor | None:
        """Takes a layer's input and output; what it returns, if anything, takes the output's place.

        Args:
            positions: int64 [n], where only some positions come to the layer: which of the batch's rows x positions.
        """


class Layer:
    """One weight W [d_out, d_in] in a model, with z = W a; this class is that of ``nn.Linear``.

    Args:
        name: The key of its factors: as a rule the module's dotted name.
        module: Where it lives.
    """

    of: ClassVar[type[nn.Module]] = nn.Linear
    # Whether the model chooses which positions come to it: then none may come in a short text.
    routed: ClassVar[bool] = False

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
        """W [d_out, d_in] in a tensor that is laid out like the parameter: to be read; a view where that can be."""
        return self.part(stored)

    def write(self, stored: Tensor, W: Tensor) -> None:
        """Puts W [d_out, d_in] into a tensor that is laid out like the parameter."""
        self.matrix(stored).copy_(W)

    @property
    def W(self) -> Tensor:
        """W [d_out, d_in] as it is in the model: to be read."""
        return self.matrix(self.parameter.data)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.matrix(torch.empty(self.parameter.shape, device="meta")).shape
        return d_out, d_in

    @property
    def device(self) -> device:
        """Of the parameter."""
        return self.parameter.device

    @property
    def dtype(self) -> dtype:
        """Of the parameter."""
        return self.parameter.dtype

    def packed(self) -> str | None:
        """Why W cannot be read from the parameter: it is quantized, or stored in another way; None if it can."""
        stored = self.parameter
        kind = f"{type(self.module).__name__} with weights of {str(stored.dtype).removeprefix('torch.')}"
        if not stored.is_floating_point() or stored.itemsize < 2:
            return f"{kind} {list(stored.shape)}"
        said = self.described()
        if said is not None and sorted(said) != sorted(stored.shape):
            return f"{kind} {list(stored.shape)}, not {list(said)}"
        return None

    def described(self) -> tuple[int, int] | None:
        """(d_out, d_in) of the whole weight as its module describes it, or None."""
        d_out = getattr(self.module, "out_features", None)
        d_in = getattr(self.module, "in_features", None)
        return (d_out, d_in) if isinstance(d_out, int) and isinstance(d_in, int) else None

    # -- what runs through it ----------------------------------------------------------------------------

    def watch(self, see: See) -> Handle:
        """Has ``see`` called in every forward: with the input as it is (a shared one is then known) and the output."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return see(self._input(args, kwargs), output)

        handle: RemovableHandle = self.module.register_forward_hook(hook, with_kwargs=True)
        return handle

    def inputs(self, seen: Tensor) -> Tensor:
        """The vectors a in an input that was seen. [..., d_in]."""
        return seen

    def outputs(self, seen: Tensor) -> Tensor:
        """The vectors z, or their gradients, in an output that was seen. [..., d_out]."""
        return seen

    def _input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The module's first tensor, by place or by keyword."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise InputError(f"{self.name} was called without a tensor; leave it out")
