"""Recitation against the textbook table of edit distances."""

import pytest
import torch

from lightning_kfac.metrics.functional import LOOSE_SIMILARITY, cut_after_end, recitation
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


@pytest.mark.parametrize("similarity", [0.0, 0.1, 0.3, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 5, 10, 48, 1000])
def test_every_loose_threshold_is_exact(similarity, length):
    """Thresholds in tenths as whole numbers: distance * 100 <= (100 - threshold) * length."""
    gold, hundredths = list(range(length)), round(100 * similarity)
    most = (100 - hundredths) * length // 100
    for distance in {max(most - 1, 0), most, min(most + 1, length)}:
        found = recitation([-1] * distance + gold[distance:], gold, loose_similarity=similarity)
        assert found.loose == (100 * distance <= (100 - hundredths) * length)
        assert found.levenshtein_norm == distance / length
        assert found.strict == (distance == 0)


def test_the_loose_threshold_is_three_quarters_unless_told():
    assert LOOSE_SIMILARITY == 0.75
    assert recitation([1, 2, 3, 9], [1, 2, 3, 4]) == (False, True, 0.25)
    assert not recitation([1, 2, 9, 9], [1, 2, 3, 4]).loose


def test_what_follows_the_gold_is_no_mistake():
    assert recitation([1, 2, 3, 4], [1, 2]) == (True, True, 0.0)
    assert recitation([], [1, 2]) == (False, False, 1.0)


def test_end_of_text_beyond_the_gold_does_not_matter():
    assert recitation([1, 2, 0], [1, 2], end_of_text={0}) == (True, True, 0.0)
    # A gold that goes on after its end is cut: the continuation is compared with what is left.
    assert recitation([1, 0, 5], [1, 0, 7, 8], end_of_text={0}) == (True, True, 0.0)
    assert recitation([1, 0, 5], [1, 0, 7, 8]) == (False, False, 0.5)


def test_cut_after_end():
    assert cut_after_end([5, 0, 7, 0], {0}) == [5, 0]
    assert cut_after_end([0, 5], {0}) == [0]
    assert cut_after_end([5, 6], {0}) == [5, 6]
    assert cut_after_end([5, 6, 7], {7, 6}) == [5, 6]
    assert cut_after_end([5, 6], frozenset()) == [5, 6] and cut_after_end([], {0}) == []
