"""Compiling what lies between the tracked layers of a model, whose own calls stay as they are for the hooks on them."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from lightning_kfac.errors import InputError, first_line

CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@cache
def check_compiler(kind: str) -> None:
    """Tries the compiler on one operation.

    Args:
        kind: Of the device: ``cpu`` or ``cuda``.

    Raises:
        InputError: Nothing can be compiled here.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=kind))
    except Exception as error:  # each part of the tool chain fails in its own way
        missing = "a C++ compiler (g++)" if kind == "cpu" else "triton and a C compiler (gcc)"
        raise InputError(
            f"torch.compile does not work here ({first_line(error)}); install {missing}, or leave collect.compile out",
            "collect.compile",
        ) from None


@contextmanager
def compiled_between(model: nn.Module, tracked: Collection[str]) -> Iterator[None]:
    """Runs the largest modules that hold no tracked layer through ``torch.compile``, and puts them back.

    Blocks of one shape share their code. A single product gains nothing and stays as it is. The first forward, and
    the first of another shape, take as long as compiling does.

    Args:
        model: Its modules are changed while the context lasts.
        tracked: Dotted names of layers, or of parameters of them.
    """
    modules = [module for module in _untouched(model, tracked) if _worth_it(module)]
    try:
        for module in modules:
            module.forward = torch.compile(module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _untouched(model: nn.Module, tracked: Collection[str], above: str = "") -> Iterator[nn.Module]:
    """The largest modules inside of a model that hold no tracked layer."""
    for name, child in model.named_children():
        full = f"{above}{name}"
        inside = any(layer == full or layer.startswith(f"{full}.") for layer in tracked)
        if not inside and not isinstance(child, CONTAINERS):
            yield child
        elif full not in tracked:
            yield from _untouched(child, tracked, f"{full}.")


def _worth_it(module: nn.Module) -> bool:
    """Whether there is anything to fuse."""
    return not isinstance(module, nn.Linear | nn.Embedding | nn.Identity)
