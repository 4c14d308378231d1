"""Recitation against the textbook table of edit distances."""

import pytest
import torch

from lightning_kfac.metrics.functional import recitation
from tests.common import generator
from tests.oracle import edit_distance


def test_recitation_against_the_textbook_table():
    numbers = generator()
    for _ in range(200):
        length = int(torch.randint(1, 12, (), generator=numbers))
        gold = torch.randint(0, 4, (length,), generator=numbers).tolist()
        continuation = torch.randint(0, 4, (int(torch.randint(0, 12, (), generator=numbers)),), generator=numbers)
        continuation = continuation.tolist()
        found = recitation(continuation, gold)
        distance = edit_distance(continuation[:length], gold)
        assert found.strict == (continuation[:length] == gold)
        assert found.loose == (1 - distance / length >= 0.75)
        assert found.levenshtein_norm == distance / length


def test_loose_threshold_is_exact():
    gold = list(range(48))
    assert recitation([-1] * 12 + gold[12:], gold).loose  # 12 / 48 = 0.25
    assert not recitation([-1] * 13 + gold[13:], gold).loose


def test_gold_is_cut_after_its_first_end_of_text():
    found = recitation([5, 0, 9, 9], [5, 0, 7, 7], end_of_text={0})
    assert found == (True, True, 0.0)
    # An early end in the continuation leaves the rest of the gold unrecited.
    assert recitation([5, 0], [5, 6, 7, 8], end_of_text={0}) == (False, False, 0.75)


def test_wrong_empty_gold():
    with pytest.raises(ValueError, match="empty"):
        recitation([1], [])
