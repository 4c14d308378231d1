"""The engine of every collection, with or without a Trainer: forward, loss and backward of a batch."""

from typing import Generic

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.objective import BatchT, Objective
from lightning_kfac.models.tokens import parts_of


class CurvatureEngine(Generic[BatchT]):
    """Differentiates the loss of batches while a capture listens.

    Args:
        model: Without trainable parameters, in eval mode.
        capture: Entered by the caller.
        objective: What is differentiated.
        rows_at_once: A batch is cut into parts of this many rows, whose activations exist at once.
        head_chunk: Positions whose outputs exist at once, see ``Objective.head``.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: CurvatureCapture,
        objective: Objective[BatchT],
        rows_at_once: int | None = None,
        head_chunk: int | None = None,
    ):
        self.model = model
        self.capture = capture
        self.objective = objective
        self.rows_at_once = rows_at_once
        self.head_chunk = head_chunk

    def run(self, batch: BatchT) -> tuple[Tensor, Tensor]:
        """Runs a batch up to its very last backward, which is left to the caller (a Trainer insists on it).

        Returns:
            The last loss, to be differentiated, and the sum of all losses, detached.
        """
        n_rows, _ = batch.shape
        parts = parts_of(self.model, batch, self.rows_at_once or n_rows)
        draws = self.objective.mc_samples
        losses: list[Tensor] = []
        with torch.enable_grad():
            for p, part in enumerate(parts, start=1):
                self.capture.begin(part.counted, part.shape)
                for d, loss in enumerate(self.objective.draws(self.model, part, self.head_chunk), start=1):
                    losses.append(loss.detach())
                    if (p, d) == (len(parts), draws):
                        return loss, sum(losses[1:], losses[0]) / draws
                    loss.backward(retain_graph=d < draws)
        raise ValueError("a batch has no rows")
