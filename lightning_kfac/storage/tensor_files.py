"""Safetensors files with a checksum, which is verified before a tensor of the file is used."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_kfac.errors import InputError, first_line
from lightning_kfac.storage.files import new_file

CHECKSUM = "sha256"


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        shapes: Of its tensors, by name.
        metadata: Text by key, among it the checksum.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    @property
    def checksum(self) -> str | None:
        """The checksum of the tensors; None in files of older versions."""
        return self.metadata.get(CHECKSUM)


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in hexadecimal digits; the order does not matter.

    Example:
        >>> one, two = {"a": torch.zeros(2), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.zeros(2)}
        >>> tensors_checksum(one) == tensors_checksum(two)
        True
    """
    return _checksum((name, tensors[name]) for name in sorted(tensors))


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> str:
    """Writes tensors with their checksum; the file appears under its name when it is complete and on the disk.

    Args:
        tensors: By name, of any dtype, on any device; no two may share memory.
        path: The file; its folder must be there.
        metadata: Further text for the file's header, which the checksum does not cover.

    Returns:
        The checksum, see ``tensors_checksum``.

    Raises:
        InputError: The disk is full.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/state.safetensors"
        >>> checksum = save_tensors({"total": torch.ones(3)}, path, {"step": "7"})
        >>> load_tensors(path, "begin anew", {"total": (3,)}, checksum)["total"].tolist()
        [1.0, 1.0, 1.0]
        >>> read_header(path, "begin anew").metadata["step"]
        '7'
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = tensors_checksum(tensors)
    with new_file(path) as partial:
        save_file(tensors, partial, metadata={**(metadata or {}), CHECKSUM: checksum})
    return checksum


def read_header(path: str | Path, advice: str) -> Header:
    """Names and shapes of a file's tensors, and its metadata, without reading a tensor.

    Args:
        advice: What to do where the file is damaged, for the message.

    Raises:
        InputError: The file is missing, or damaged so that it shows.
    """
    with _opened(path, advice) as file:
        return _header(file)


def load_tensors(
    path: str | Path,
    advice: str,
    shapes: Mapping[str, Sequence[int]] | None = None,
    checksum: str | None = None,
    verify: bool = True,
) -> dict[str, Tensor]:
    """Reads tensors of a file, after shapes and checksum are found right.

    Shapes are compared with the file's header before anything is allocated. The tensors are mapped into memory, so
    verifying the whole file to read a part of it costs time, not memory. Files of older versions have no checksum.

    Args:
        path: The file.
        advice: What to do where it is damaged, for the message.
        shapes: The tensors to read with the shapes that they must have; by default all as they are.
        checksum: What the file's checksum is known to be: another file in its place is found out.
        verify: False leaves the checksum out, for a file that has been verified.

    Returns:
        Tensors on the CPU by name.

    Raises:
        InputError: The file is missing, damaged, or another one than expected.
    """
    with _opened(path, advice) as file:
        header = _header(file)
        for name, shape in (shapes or {}).items():
            if name not in header.shapes:
                raise _Damaged(f"it has no tensor {name!r}")
            if header.shapes[name] != tuple(shape):
                raise _Damaged(f"{name} has the shape {list(header.shapes[name])}, not {list(shape)}")
        if checksum is not None and header.checksum != checksum:
            raise _Damaged("its checksum is not the recorded one; was another file put in its place?")
        if verify and header.checksum is not None:
            found = _checksum((name, file.get_tensor(name)) for name in sorted(header.shapes))
            if found != header.checksum:
                raise _Damaged("its contents do not have the checksum that it says")
        return {name: file.get_tensor(name) for name in shapes or header.shapes}


class _Damaged(Exception):
    """Says what is wrong with an open file."""


@contextmanager
def _opened(path: str | Path, advice: str) -> Iterator[safe_open]:
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise _Damaged("there is no such file")
        with safe_open(path, framework="pt") as file:
            yield file
    # Types and shapes that no tensor can have end in various errors of torch.
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, SafetensorError, _Damaged) as error:
        raise InputError(f"{path}: damaged or incomplete: {first_line(error)}; {advice}") from None


def _header(file: safe_open) -> Header:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Header(shapes, file.metadata() or {})


def _checksum(tensors: Iterator[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
