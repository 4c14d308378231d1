"""Greedy decoding of many prefixes at once."""

import inspect
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy_continuations(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    lengths: Sequence[int],
    end_of_text: Collection[int] = frozenset(),
) -> list[list[int]]:
    """Continues every prefix greedily by its own number of tokens.

    Prefixes are padded on the left, so all of them decode from their last real token. The argmax is
    taken over float32 logits, ties to the lowest id. No generation setting of the checkpoint applies.

    Args:
        prefixes: B non-empty lists of token ids.
        lengths: B numbers of tokens to generate.
        end_of_text: A row stops after one of these.

    Returns:
        B lists; shorter than asked for where the text ended.
    """
    if not prefixes:
        return []
    device = next(model.parameters()).device
    ids, attend = _left_pad(prefixes, device)
    positions = (attend.cumsum(-1) - 1).clamp(min=0)
    options = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    stop = torch.tensor(sorted(end_of_text), device=device, dtype=torch.long)
    limits = torch.tensor(list(lengths), device=device)
    running = limits > 0
    generated, cache = [], None
    while running.any():
        output = model(input_ids=ids, attention_mask=attend, position_ids=positions, past_key_values=cache, **options)
        token = output.logits[:, -1].float().argmax(-1)
        generated.append(torch.where(running, token, -1))
        running = running & (limits > len(generated)) & ~torch.isin(token, stop)
        cache, ids, positions = output.past_key_values, token[:, None], positions[:, -1:] + 1
        attend = torch.cat([attend, attend.new_ones(len(attend), 1)], dim=1)
    if not generated:
        return [[] for _ in prefixes]
    return [[t for t in row if t >= 0] for row in torch.stack(generated, dim=1).tolist()]


def _left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    attend = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, attend
