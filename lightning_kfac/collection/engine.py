"""The engine of every collection, with or without a Trainer: forward, loss and backward of a batch."""

import math

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.models.tokens import TokenBatch


class CurvatureEngine:
    """Differentiates the Fisher loss of batches while a capture listens.

    Args:
        model: A causal language model without trainable parameters, in eval mode.
        capture: Entered by the caller.
        loss: What is differentiated.
        rows_at_once: A batch is cut into parts of this many rows, whose activations exist at once.
        head_chunk: Tokens whose logits exist at once; None takes the logits from the model whole.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: CurvatureCapture,
        loss: FisherLoss,
        rows_at_once: int | None = None,
        head_chunk: int | None = None,
    ):
        self.model, self.capture, self.loss = model, capture, loss
        self.rows_at_once, self.head_chunk = rows_at_once, head_chunk

    def run(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """Runs a batch up to its very last backward, which is left to the caller (a Trainer insists on it).

        Returns:
            The last loss, to be differentiated, and the sum of all losses, detached.
        """
        rows = self.rows_at_once or len(tokens.input_ids)
        parts, draws = math.ceil(len(tokens.input_ids) / rows), self.loss.mc_samples
        total = 0.0
        with torch.enable_grad():
            for p, part in enumerate(tokens.split(rows), start=1):
                self.capture.begin(None if part.dense else part.valid)
                for d, loss in enumerate(self.loss.draws(self.model, part, self.head_chunk), start=1):
                    total = total + loss.detach()
                    if (p, d) == (parts, draws):
                        return loss, total / draws
                    loss.backward(retain_graph=d < draws)
        raise ValueError("a batch has no rows")
