"""Rows read with a band: each token sees itself and the tokens before it, so many in all.

A mask over whole rows costs the attention of all pairs of tokens. With a key-value cache the rows are read in pieces,
each of which sees what the band needs of those before it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from lightning_kfac.models.cached_rows import has_plain_cache
from lightning_kfac.models.language import language_model
from lightning_kfac.models.logits import LOGITS_AT_ONCE, logits_in_slices
from lightning_kfac.models.manner import Trial, manner_of, trying
from lightning_kfac.models.probes import banded_mask, is_plain_head, once_a_model, takes_own_mask
from lightning_kfac.models.tokens import TokenBatch

# Positions of a piece.
PIECE = 64


@torch.no_grad()
def banded_argmax(model: nn.Module, batch: TokenBatch, context: int, first: int = 0) -> Tensor:
    """The likeliest token behind each position, ties by the lowest id. int64 [B, T].

    Args:
        context: Tokens that each sees, where the model takes a mask of its own (``takes_own_mask``); else all.
        first: Positions before this one need not be told; they may be -1.
    """
    length = batch.shape[1]
    if manner_of(model).is_apart(length) or not goes_on_in_pieces(model):
        mask = banded_mask(model, length, context) if takes_own_mask(model) else None
        tokens = [logits.float().argmax(-1) for _, logits in logits_in_slices(model, batch, mask=mask)]
        return torch.cat(tokens).view(batch.input_ids.shape)
    manner_of(model).check_length(model, length)
    found = torch.full_like(batch.input_ids, -1)
    head = language_model(model).get_output_embeddings()
    for rows, start, hidden in _pieces(model, batch, context):
        skipped = max(0, first - start)
        wanted = hidden[:, skipped:]
        parts = wanted.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // head.weight.shape[0]))
        tokens = [F.linear(part, head.weight, head.bias).float().argmax(-1) for part in parts]
        if wanted.numel():
            found[rows, start + skipped : start + hidden.shape[1]] = torch.cat(tokens).view(wanted.shape[:2])
    return found


@once_a_model
def goes_on_in_pieces(model: nn.Module) -> bool:
    """Whether rows read in pieces with a band are those read whole with it; tried out on two."""
    if not (is_plain_head(model) and takes_own_mask(model) and has_plain_cache(model)):
        return False
    try:
        with trying(model):
            trial = Trial(model)
            context = max(1, len(trial.long) // 3)
            batch = TokenBatch.from_dict({"input_ids": torch.stack([trial.long, trial.long.flip(0)]), "dense": False})
            mask = banded_mask(model, len(trial.long), context)
            base = language_model(model).base_model
            whole = base(**(batch.model_inputs(model) | {"attention_mask": mask})).last_hidden_state.double()
            pieces = torch.cat([hidden for _, _, hidden in _pieces(model, batch, context, 2)], 1).double()
            return bool((pieces - whole).norm() <= trial.tolerance * whole.norm())
    except Exception:  # models refuse a cache with such a mask each in its own way
        return False


def _pieces(
    model: nn.Module, batch: TokenBatch, context: int, size: int = PIECE
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Of each piece: numbers of the rows that have tokens there, its first position, hidden states [rows, n, d]."""
    ends = batch.attend.sum(1)
    rows = torch.arange(len(ends), device=ends.device)
    cache = DynamicCache()
    base = language_model(model).base_model
    for start in range(0, int(ends.max()), size):
        stop = min(start + size, int(ends.max()))
        going = ends[rows] > start
        before = min(start, context - 1)
        _keep(cache, None if going.all() else going, before)
        rows = rows[going]
        positions = torch.arange(start, stop, device=ends.device).expand(len(rows), -1)
        mask = banded_mask(model, stop - start, context, before)
        ids = batch.input_ids[rows, start:stop]
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        yield rows, start, base(input_ids=ids, **inputs).last_hidden_state


def _keep(cache: DynamicCache, rows: Tensor | None, places: int) -> None:
    """Leaves of a cache some rows (all of them without a number) and the last places."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            states = states[:, :, states.shape[2] - places :]
            setattr(layer, name, states if rows is None else states[rows])
