"""Batches of tokens."""

import pytest
import torch

from lightning_kfac.models.tokens import TokenBatch
from tests.common import build_model


def test_rows_of_a_batch_by_length_have_the_same_loss_without_the_padding():
    model = build_model("llama")
    lengths = [12, 3, 9, 12, 5, 2]
    ids = torch.zeros(6, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(row))
        mask[row, :n] = 1
    batch = TokenBatch.from_dict({"input_ids": ids, "attention_mask": mask})
    parts = list(batch.by_length())
    assert [p.input_ids.shape for p in parts] == [(3, 5), (3, 12)]
    with torch.no_grad():
        whole, split = batch.gold_loss(model), sum(p.gold_loss(model) for p in parts)
    assert split.item() == pytest.approx(whole.item(), rel=1e-6)
    assert sum(int(p.valid.sum()) for p in parts) == sum(n - 1 for n in lengths)
