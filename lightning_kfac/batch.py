"""A batch of token rows, with its two masks made explicit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import (
    IGNORED,
    next_tokens,
    sample_labels,
    summed_cross_entropy,
    uniforms,
    valid_positions,
)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for a causal language model.

    Attributes:
        input_ids: int64 [B, T].
        attend: bool [B, T], True where the token is real. Never inferred from the pad id: a genuine
            end-of-text token may share it.
        labels: int64 [B, T] in the Hugging Face convention (unshifted, -100 ignored).
        sample_index: int64 [B], global row numbers; they key the sampled labels.
    """

    input_ids: Tensor
    attend: Tensor
    labels: Tensor
    sample_index: Tensor

    @classmethod
    def from_dict(cls, batch: dict, first_index: int = 0) -> "TokenBatch":
        """Reads ``input_ids`` and optionally ``attention_mask``, ``labels`` and ``sample_index``.

        Args:
            first_index: Number of the first row where the batch has no ``sample_index``.

        Raises:
            InputError: A field is missing or has another shape than ``input_ids``.
        """
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise InputError("a batch needs `input_ids`, an integer tensor [rows, positions]")
        mask, labels, index = batch.get("attention_mask"), batch.get("labels"), batch.get("sample_index")
        for name, field in (("attention_mask", mask), ("labels", labels)):
            if field is not None and field.shape != ids.shape:
                raise InputError(f"batch: {name} has shape {list(field.shape)}, input_ids {list(ids.shape)}")
        attend = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if labels is None:
            labels = ids.masked_fill(~attend, IGNORED)
        if index is None:
            index = torch.arange(first_index, first_index + len(ids), device=ids.device)
        return cls(ids, attend, labels, index)

    @property
    def valid(self) -> Tensor:
        """bool [B, T]: positions that count in the loss, in A, in G and in N."""
        return valid_positions(self.attend, self.labels)

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, T]: index among the row's real tokens, so that left padding changes nothing."""
        return (self.attend.long().cumsum(-1) - 1).clamp(min=0)

    def logits(self, model: nn.Module) -> Tensor:
        """Runs the model. [B, T, V] in the model's dtype."""
        return model(
            input_ids=self.input_ids,
            attention_mask=self.attend.long(),
            position_ids=self.position_ids,
            use_cache=False,
        ).logits

    def fisher_loss(self, model: nn.Module, labels: str, seed: int) -> Tensor:
        """Summed cross-entropy over the valid positions, a scalar tensor.

        Args:
            labels: ``sampled`` draws them from the model's own predictions (true Fisher);
                ``gold`` takes the corpus (empirical Fisher).
        """
        logits = self.logits(model)
        if labels == "gold":
            targets = next_tokens(self.labels)
        else:
            targets = sample_labels(logits, uniforms(seed, self.sample_index, self.position_ids))
        return summed_cross_entropy(logits, targets, self.valid)
