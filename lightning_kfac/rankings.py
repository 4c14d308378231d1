"""Rankings: a model's top tokens at every position of a text, kept on disk."""

import tempfile

import numpy as np
import torch
from torch import Tensor


class Rankings:
    """Batches of top tokens in a temporary file, so that memory does not grow with the text.

    Example:
        >>> rankings = Rankings()
        >>> rankings.append(torch.tensor([[[3, 1], [2, 0]]]))
        >>> rankings[0].tolist()
        [[[3, 1], [2, 0]]]
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="rankings-")  # noqa: SIM115 (gone with the object)
        self._batches: list[tuple[int, torch.Size]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, ranking: Tensor) -> None:
        """Adds a batch, [B, T, k]."""
        self._batches.append((self._file.seek(0, 2), ranking.shape))
        self._file.write(ranking.to("cpu", torch.int32).contiguous().numpy().tobytes())

    def __getitem__(self, number: int) -> Tensor:
        """A batch, int64 [B, T, k]."""
        offset, shape = self._batches[number]
        self._file.seek(offset)
        values = np.frombuffer(self._file.read(4 * shape.numel()), dtype=np.int32)
        return torch.from_numpy(values.astype(np.int64)).view(shape)
