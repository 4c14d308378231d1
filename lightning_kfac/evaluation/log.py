"""What a model said in an evaluation, kept on disk so that an interrupted one goes on."""

import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.storage.keyed_log import KeyedLog


class EvaluationLog:
    """Remembers results by a name and gives them back instead of computing them again.

    Args:
        folder: Of this evaluation.
        key: Identifies model, data and settings: results of others are not given.
        rank: Each has files of its own.

    Example:
        >>> import tempfile
        >>> log = EvaluationLog(Path(tempfile.mkdtemp()), "0f3a", rank=0)
        >>> log.once("first", lambda: [1, 2]), log.once("first", lambda: [3, 4])
        ([1, 2], [1, 2])
    """

    def __init__(self, folder: Path, key: str, rank: int):
        self._log = KeyedLog(folder / f"rank-{rank}.jsonl", "evaluation", key)
        self._tensors = folder / f"rank-{rank}.bin"
        if not self._log.is_ours:
            self._tensors.unlink(missing_ok=True)
            self._known: dict[str, Any] = {}
        else:
            self._known = {str(row.get("name")): row.get("value") for row in self._log.rows()}

    def knows(self, name: str) -> bool:
        """Whether a result of this name was computed already."""
        return name in self._known

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What JSON makes of ``compute()``."""
        if not self.knows(name):
            self._remember(name, compute())
        return self._known[name]

    def tensors_once(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors that ``compute`` gives, to the last bit."""
        try:
            return tuple(self._read(**entry) for entry in self._known[name])
        except (KeyError, TypeError, ValueError, OSError, AttributeError, RuntimeError):
            tensors = compute()
            with suppress(OSError):
                self._remember(name, [self._write(tensor) for tensor in tensors])
            return tensors

    def _remember(self, name: str, value: Any) -> None:
        self._known[name] = value
        with suppress(OSError):  # a full disk: it would have to be computed again
            self._log.append({"name": name, "value": value})

    def _write(self, tensor: Tensor) -> dict[str, Any]:
        contents = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._tensors.parent.mkdir(parents=True, exist_ok=True)
        with open(self._tensors, "ab") as file:
            start = file.tell()
            file.write(contents)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"start": start, "shape": list(tensor.shape), "dtype": dtype, "crc": zlib.crc32(contents)}

    def _read(self, start: int, shape: list[int], dtype: str, crc: int) -> Tensor:
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        if start + size > self._tensors.stat().st_size:
            raise ValueError("cut off")
        with open(self._tensors, "rb") as file:
            file.seek(start)
            contents = file.read(size)
        if zlib.crc32(contents) != crc:
            raise ValueError("damaged")
        return torch.frombuffer(bytearray(contents), dtype=torch.uint8).view(kind).view(shape)


class NoLog(EvaluationLog):
    """Remembers nothing."""

    def __init__(self) -> None:
        self._known = {}

    @override
    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Computes it."""
        return compute()

    @override
    def tensors_once(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Computes them."""
        return compute()
