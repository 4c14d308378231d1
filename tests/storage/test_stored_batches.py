"""Batches on the disk."""

import tracemalloc

import torch

from lightning_kfac.storage.stored_batches import StoredBatches


def test_stored_batches_come_back_and_take_no_memory():
    kept = StoredBatches(torch.int32)
    batches = [torch.randint(0, 100_000, (b, 50, 10)) for b in (3, 1, 4)]
    for batch in batches:
        kept.append(batch)
    for number in (2, 0, 1):
        assert torch.equal(kept[number], batches[number])
    tracemalloc.start()
    many = torch.zeros(8, 512, 10, dtype=torch.int64)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        kept.append(many)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50_000  # bytes, for 8 MB of rankings
