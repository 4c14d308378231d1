"""Logits of a batch, a slice of positions at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfac.models.language import language_model, vocabulary_size
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.probes import is_plain_head
from lightning_kfac.models.tokens import TokenBatch

# Logits exist for a slice of positions at a time: 256 MB in float32, whatever the vocabulary and the text.
LOGITS_AT_ONCE = 1 << 26


def logits_in_slices(
    model: nn.Module, batch: TokenBatch, places: Tensor | None = None, mask: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of all positions [B T] with their logits [n, V], in the model's dtype.

    Args:
        places: int64 [B, k], positions of each row whose logits are wanted; then slices are of [B k].
        mask: Given to the model instead of the batch's own; padding cannot be told from it.
    """
    rows, length = batch.shape
    wanted = torch.arange(length, device=batch.input_ids.device).expand(rows, -1) if places is None else places
    each = wanted.shape[1]
    if manner_of(model).is_apart(length):
        for number, row in enumerate(batch.alone()):
            logits = model(**row.model_inputs(model)).logits[0]
            yield slice(number * each, (number + 1) * each), logits[wanted[number].clamp(max=len(logits) - 1)]
        return
    own = {} if mask is None else {"attention_mask": mask}
    if is_plain_head(model):
        hidden = language_model(model).base_model(**(batch.model_inputs(model) | own)).last_hidden_state
        hidden = (hidden if places is None else _taken(hidden, places)).flatten(0, 1)
        head = language_model(model).get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            yield part, F.linear(hidden[part], head.weight, head.bias)
    else:
        at_once = max(1, LOGITS_AT_ONCE // (length * vocabulary_size(model)))
        for number, some in enumerate(batch.split(at_once)):
            logits = model(**(some.model_inputs(model) | own)).logits
            start = number * at_once
            logits = logits if places is None else _taken(logits, places[start : start + at_once])
            yield slice(start * each, start * each + logits[..., 0].numel()), logits.flatten(0, 1)


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """Some positions of each row: [B, T, n] and [B, k] give [B, k, n]."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))
