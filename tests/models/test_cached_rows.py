"""Rows that are read piece by piece, against the same rows read whole."""

import pytest
import torch

from lightning_kfac.models.cached_rows import CachedRows, RereadRows
from tests.common import VOCAB, build_model


@torch.no_grad()
def alone(model, ids, count):
    """Logits behind the last tokens of one row."""
    return model(input_ids=ids[None], use_cache=False).logits[0, -count:]


@pytest.mark.parametrize("room", [None, 0, 7, 100])
@torch.no_grad()
def test_a_cache_with_room_is_one_without(room):
    """Pieces of several sizes, more of them than there is room for at first."""
    model = build_model("llama", torch.float64)
    ids = torch.randint(VOCAB, (3, 60), generator=torch.Generator().manual_seed(0))
    rows = CachedRows(model, 3, room)
    start = 0
    for size in (5, 1, 1, 30, 1, 2, 20):
        logits = rows.read(ids[:, start : start + size], torch.ones(3, size, dtype=torch.bool), size)
        start += size
        for number in range(3):
            torch.testing.assert_close(logits[number], alone(model, ids[number, :start], size))


@pytest.mark.parametrize("kind", [CachedRows, RereadRows])
@torch.no_grad()
def test_joined_rows_go_on_as_each_alone(kind):
    """Of different lengths, some of them cut, in few places: no place is kept that no row needs."""
    model = build_model("olmo2", torch.float64)
    ids = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(1))
    parts = [(ids[:2, :9], [9, 4]), (ids[2:, :6], [1, 6, 5])]
    several = []
    for part, lengths in parts:
        rows = kind(model, len(part), 0) if kind is CachedRows else kind(model, len(part))
        rows.read(part, torch.ones_like(part, dtype=torch.bool))
        rows.forget_after(torch.tensor(lengths))
        several.append(rows)
    joined = several[0].joined(several[1:])
    assert joined.attend.shape == (5, 9)
    chosen = torch.tensor([4, 0, 2])
    taken = joined.take(chosen)
    for rows, numbers in ((joined, range(5)), (taken, chosen.tolist())):
        more = ids[list(numbers), -3:]
        logits = rows.read(more, torch.ones_like(more, dtype=torch.bool), 3)
        for row, number in zip(logits, numbers, strict=True):
            kept = ids[number, : [9, 4, 1, 6, 5][number]]
            torch.testing.assert_close(row, alone(model, torch.cat([kept, ids[number, -3:]]), 3))
