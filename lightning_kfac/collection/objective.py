"""What a task must say of itself, so that its curvature can be collected.

A task beside language modelling is a batch and an objective of its own; nothing else here knows what a batch holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self, TypeVar

from lightning_kfac.models.layer import Layer

# Where the task is not known, as in a callback, neither is its batch.
BatchT = TypeVar("BatchT", bound="Batch", default=Any)


class Batch(Protocol):
    """Rows of positions that a model reads."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, positions of each)."""

    @property
    def counted(self) -> Tensor | None:
        """bool [rows, positions], those that count in loss, A, G and N; None if all do."""

    def split(self, rows: int) -> Iterator[Self]:
        """Parts of at most ``rows`` rows."""


class Objective(Protocol[BatchT]):
    """The summed loss whose curvature is collected."""

    @property
    def mc_samples(self) -> int:
        """Draws of labels a forward pass."""

    def draws(self, model: nn.Module, batch: BatchT, head_chunk: int | None) -> Iterator[Tensor]:
        """One loss for each draw of labels, all on one forward pass: scalar tensors to differentiate.

        Args:
            head_chunk: What ``head`` chose.
        """

    def trial(self, positions: int, device: torch.device) -> BatchT:
        """One row to try the model on: which layers run, and what autograd keeps of a position."""

    def head(
        self, model: nn.Module, layers: Mapping[str, Layer], device: torch.device, positions: int
    ) -> tuple[int | None, int]:
        """How the model's output is cut so that it does not exist whole, for a batch of so many positions.

        Returns:
            Positions whose outputs exist at once (None: all of them), and the bytes that these take.
        """


class Runs(Protocol):
    """What runs a batch of a collection.

    Attributes:
        loss: Summed loss of the latest batch, detached.
    """

    loss: Tensor

    def run(self, batch: Any) -> Tensor:
        """Runs a batch up to its last backward; gives what Lightning is to differentiate."""
