"""Rows of tokens that a model reads piece by piece, and their greedy continuations."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lightning_kfac.models.cached_rows import ReadRows, bears_gaps, read_rows
from lightning_kfac.models.tokens import left_padded

# Once no more than this share of the rows goes on, those are taken by themselves.
FEW = 0.75


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
    if not prefixes or not any(lengths):
        return [[] for _ in prefixes]
    longest = max(len(prefix) + length for prefix, length in zip(prefixes, lengths, strict=True))
    rows = read_rows(model, len(prefixes), longest)
    ids, real = left_padded(prefixes, rows.attend.device)
    first = rows.read(ids, real)[:, -1].float().argmax(-1)
    return continue_greedily(rows, first, torch.tensor(list(lengths)), end_of_text)


def continue_greedily(
    rows: ReadRows, first: Tensor, lengths: Tensor, end_of_text: Collection[int] = frozenset()
) -> list[list[int]]:
    """Decodes rows from their first generated token on, which the model has not read yet.

    Args:
        first: int64 [B].
        lengths: int64 [B], tokens to generate, the first one included.
        end_of_text: A row stops after one of these.
    """
    stop = torch.tensor(sorted(end_of_text), device=first.device, dtype=torch.long)
    generated: list[list[int]] = [[] for _ in lengths]
    numbers = list(range(len(generated)))
    left = lengths.to(first.device)
    token = first
    running = left > 0
    while True:
        for number, new, runs in zip(numbers, token.tolist(), running.tolist(), strict=True):
            if runs:
                generated[number].append(new)
        left = left - 1
        running = running & (left > 0) & ~torch.isin(token, stop)
        going = running.nonzero()[:, 0]
        if not len(going):
            return generated
        if len(going) <= FEW * len(running) and bears_gaps(rows):
            rows = rows.take(going)
            numbers = [numbers[i] for i in going.tolist()]
            left, token, running = left[going], token[going], running[going]
        # Rows that have ended read nothing: their positions must not grow beyond what the model takes.
        token = rows.read(token[:, None], running[:, None])[:, -1].float().argmax(-1)
