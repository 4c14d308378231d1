"""Repetitions and duplicates are told apart."""

import math
import random

import pytest

from lightning_kfac.mining.duplicates import entropy_bits, first_of_each


def test_entropy():
    assert entropy_bits([5] * 48) == 0
    assert entropy_bits([1, 2] * 24) == pytest.approx(1)
    assert entropy_bits(list(range(48))) == pytest.approx(math.log2(48))


def test_near_duplicates_by_jaccard_overlap():
    rng = random.Random(0)
    base = [rng.randrange(1000) for _ in range(112)]
    texts = [base]
    for shift in (0, 8, 16, 24, 64):
        texts.append(base[shift:] + [rng.randrange(1000) for _ in range(shift)])
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        kept, grams = [], [{tuple(t[i : i + 5]) for i in range(108)} for t in texts]
        for number, own in enumerate(grams):
            if all(len(own & grams[k]) / len(own | grams[k]) < threshold for k in kept):
                kept.append(number)
        found, exact, near = first_of_each(texts, threshold)
        assert found == kept and exact == 1 and near == len(texts) - 1 - len(kept)


def test_texts_shorter_than_a_gram():
    assert first_of_each([[1, 2], [1, 2], [1, 3]], 0.7) == ([0, 2], 1, 0)
