"""Reading the files of other tools, and what they must hold. Nothing but tensors is ever unpickled."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_kfac.errors import InputError, first_line
from lightning_kfac.factors.kronecker import KroneckerFactors

Layers = Iterator[tuple[str, KroneckerFactors]]
# Largest |M - M^T| relative to the largest entry: sums of products in another order, by precision.
ASYMMETRY = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def factors_of(A: Any, G: Any, place: str, A_count: int, G_count: int, n_tokens: int) -> KroneckerFactors:
    """Means of A and G from what a file holds at ``place``, divided by their counts."""
    return KroneckerFactors(_mean(A, A_count, f"{place}: A"), _mean(G, G_count, f"{place}: G"), n_tokens)


def _mean(matrix: Any, count: int, place: str) -> Tensor:
    """``matrix / count``, exactly symmetric, float32 [d, d]."""
    if not isinstance(matrix, Tensor) or matrix.layout != torch.strided or matrix.dtype not in ASYMMETRY:
        raise InputError(f"{place} is not a dense tensor of real numbers; collect it again")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{place} has shape {list(matrix.shape)}, it must be square; is a shard missing?")
    if matrix.untyped_storage().nbytes() < matrix.numel() * matrix.element_size():
        raise InputError(f"{place} claims {list(matrix.shape)} numbers and holds fewer; the file is damaged")
    tolerance = ASYMMETRY[matrix.dtype]
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    largest = matrix.abs().max()
    if not largest.isfinite():
        raise InputError(f"{place} has numbers that are not finite; collect it again")
    if (matrix - matrix.T).abs().max() > tolerance * largest or matrix.diagonal().min() < 0:
        raise InputError(f"{place} is not a second moment: not symmetric, or negative on the diagonal")
    return ((matrix + matrix.T) / (2 * count)).float()


def without_bias(total: Tensor, count: int) -> Tensor:
    """Drops the last row and column if they belong to a column of ones: its square sums to the count.

    Below 2^24 the sum is exact. Above, or in bfloat16, it is not: then an odd size has to support it, since
    layers are of even width as a rule. A wrong guess is found out by the editor, which compares shapes.
    """
    if total.ndim != 2 or len(total) < 2 or total.shape[0] != total.shape[1]:
        return total
    tolerance = 1e-2 if len(total) % 2 else 1e-6
    return total[:-1, :-1] if abs(total[-1, -1].item() - count) <= tolerance * count else total


def checked_count(value: Any, place: str, expected: int | None = None) -> int:
    """A token count, which must agree with what the user expects."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, int) or number <= 0:
        raise InputError(f"{place}: the token count must be a positive whole number")
    if expected not in (None, number):
        raise InputError(f"{place} is {number}, not {expected}; leave n_tokens out")
    return number


def load_pickled(path: Path) -> Any:
    """The contents of a ``.pt`` file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        what = type(error).__name__
        raise InputError(f"{path}: cannot be read ({what}); it is damaged or holds more than tensors") from None


def load_dict(path: Path) -> dict[object, Any]:
    """The same, which must be a dict."""
    contents = load_pickled(path)
    if not isinstance(contents, dict):
        raise InputError(f"{path}: holds a {type(contents).__name__}, not a dict of layers")
    return contents


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    with open_safetensors(path) as file:
        return file.get_tensor(key)


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file; whatever is wrong with it is an ``InputError``."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); is it complete?") from None
