"""StoredBatches: what a model said of each batch of a text, kept on disk."""

import tempfile

import numpy as np
import torch
from torch import Tensor


class StoredBatches:
    """Tensors in a temporary file, so that memory does not grow with the text.

    Args:
        dtype: In which they are kept.

    Example:
        >>> stored = StoredBatches(torch.int32)
        >>> stored.append(torch.tensor([[3, 1], [2, 0]]))
        >>> stored[0].tolist()
        [[3, 1], [2, 0]]
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._file = tempfile.TemporaryFile(prefix="batches-")  # noqa: SIM115 (gone with the object)
        self._batches: list[tuple[int, torch.Size]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, batch: Tensor) -> None:
        """Adds a batch of any shape."""
        self._batches.append((self._file.seek(0, 2), batch.shape))
        self._file.write(batch.to("cpu", self.dtype).contiguous().numpy().tobytes())

    def __getitem__(self, number: int) -> Tensor:
        """A batch, on the CPU."""
        offset, shape = self._batches[number]
        self._file.seek(offset)
        empty = torch.empty(0, dtype=self.dtype).numpy()
        values = np.frombuffer(self._file.read(empty.itemsize * shape.numel()), dtype=empty.dtype)
        return torch.from_numpy(values.copy()).view(shape)
