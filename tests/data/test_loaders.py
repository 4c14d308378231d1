"""How rows are shared out among ranks and made into batches."""

import numpy as np
import pytest
import torch

from lightning_kfac.data.loaders import FILLER, ShardedBatches, TokenRows, collate_rows, row_loader
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.texts import with_planted
from lightning_kfac.models.tokens import TokenBatch


@pytest.mark.parametrize("n_rows", [1, 9, 17, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_row_is_on_exactly_one_rank(n_rows, world_size, seed):
    ranks = [list(ShardedBatches(n_rows, 4, rank, world_size, seed)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # ranks wait for each other
    assert [len(batches) for batches in ranks] == [len(ShardedBatches(n_rows, 4, 0, world_size))] * world_size
    rows = [row for batches in ranks for batch in batches for row in batch if row != FILLER]
    assert sorted(rows) == list(range(n_rows))


def test_collate_pads_on_the_right_and_gives_filler_no_weight():
    rows = TokenRows(np.arange(10, dtype=np.int32), np.array([0, 4, 8, 10]))
    batch = collate_rows([rows[2], rows[0], rows[FILLER]])
    assert batch["input_ids"].tolist() == [[8, 9, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4, [1] * 4]
    assert batch["labels"].tolist() == [[8, 9, -100, -100], [0, 1, 2, 3], [-100] * 4]
    assert batch["sample_index"].tolist() == [2, 0, 0]
    dense = collate_rows([rows[0], rows[1]])
    assert dense["dense"] and dense["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert set(dense) == {"input_ids", "sample_index", "dense"}


def packed():
    """Rows of four over documents of 3, 1, 6 and 2 tokens, the third of which was cut."""
    tokens = np.arange(10, 22, dtype=np.int32)
    return TokenRows(tokens, np.array([0, 4, 8, 12]), (), np.array([3, 4, 10, 12]), np.array([9]))


def test_documents_of_targets():
    """The token behind each place; of a row's last place, and of padding, anything."""
    found = packed().documents_of_targets(torch.tensor([2, 0]), 3)
    assert found.tolist() == [[2, 3, 3], [0, 0, 1]]
    for places in (4, 7):
        wide = packed().documents_of_targets(torch.tensor([1, 2]), places)
        assert wide[:, :3].tolist() == [[2, 2, 2], [2, 3, 3]] and wide.max() == 3
    with pytest.raises(ValueError, match="do not know their documents"):
        TokenRows(np.arange(4), np.array([0, 4])).documents_of_targets(torch.tensor([0]), 3)


def test_where_a_document_was_cut_nothing_is_predicted():
    rows = packed()
    assert rows.unlabelled() == {2: [1]}
    (batch,) = row_loader(rows, 3, 0, 1)
    tokens = TokenBatch.from_dict(batch)
    assert tokens.input_ids.tolist() == [[10, 11, 12], [14, 15, 16], [18, 19, 20]]
    assert tokens.targets.tolist() == [[11, 12, 13], [15, 16, 17], [-100, 20, 21]]
    alone = [TokenBatch.from_dict(batch) for batch in row_loader(rows, 1, 0, 1)]
    assert [batch.targets[0].tolist() for batch in alone] == tokens.targets.tolist()
    assert [batch.complete for batch in alone] == [True, True, False]
    planted = with_planted(rows, [MemorizedSequence([1, 2], [3])], 2)
    assert planted.unlabelled() == {2: [1]} and len(planted) == 5
