"""Gradients that nobody asked for: hooks of an earlier training that make an activation require one.

Gradient checkpointing and adapters leave such hooks at the embedding (``enable_input_require_grads``). With them every
backward goes down to the embedding, although it could end at the lowest tracked layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def without_leftover_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no hook that a module already has makes the graph begin there; parameters must be frozen."""
    handles: list[RemovableHandle] = []
    for module in model.modules():
        if module._forward_pre_hooks:
            handles.append(module.register_forward_pre_hook(_cut_before, with_kwargs=True))
        if module._forward_hooks:
            handles.append(module.register_forward_hook(_cut_after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cut_before(module: nn.Module, args: Any, kwargs: Any) -> None:
    _cut(args)
    _cut(kwargs)


def _cut_after(module: nn.Module, args: Any, output: Any) -> None:
    _cut(output)


def _cut(value: Any) -> None:
    """Takes the wish for a gradient from tensors at which a graph would begin."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf and not isinstance(value, nn.Parameter):
            value.requires_grad_(False)
    elif isinstance(value, dict):
        _cut(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            _cut(part)
