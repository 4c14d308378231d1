"""How rows are shared out among ranks and made into batches."""

import numpy as np
import pytest

from lightning_kfac.data.loaders import FILLER, ShardedBatches, TokenRows, collate_rows


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
