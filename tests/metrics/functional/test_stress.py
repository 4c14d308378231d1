"""The longest recited run against every prompt written out."""

import itertools

import pytest

from lightning_kfac.metrics.functional import stress_length
from lightning_kfac.metrics.functional.stress import leading_run


def longest(hits, shifted, t, include_unperturbed):
    """Each prompt ends after e gold tokens; count on from there until a miss."""
    best = max(shifted, default=0)
    for e in range(0 if include_unperturbed else 1, t + 1):
        run = 0
        while e + run < len(hits) and hits[e + run]:
            run += 1
        best = max(best, run)
    return best


@pytest.mark.parametrize("n", range(6))
def test_every_pattern_of_hits(n):
    for hits in itertools.product([False, True], repeat=n):
        for t, shifted, unperturbed in itertools.product((0, 1, 2, 9), ([], [0], [2, 1]), (False, True)):
            expected = longest(hits, shifted, t, unperturbed)
            assert stress_length(hits, shifted, t, include_unperturbed=unperturbed) == expected


def test_the_prefix_itself_does_not_count_unless_told():
    assert stress_length([True, True, True], [], t=1) == 2
    assert stress_length([True, True, True], [], t=1, include_unperturbed=True) == 3


def test_leading_run():
    for hits in itertools.product([False, True], repeat=5):
        text = "".join("x" if hit else "." for hit in hits)
        assert leading_run(hits) == len(text.split(".")[0])
    assert leading_run([]) == 0


def test_stress_length_by_hand():
    hits = [True, True, False, True, True, True, False]
    assert stress_length(hits, [], t=20) == 3  # after three extra tokens
    assert stress_length(hits, [], t=2) == 1  # after one: hits[1:] begins with one hit
    assert stress_length(hits, [5], t=2) == 5
    assert stress_length([True] * 4, [], t=20) == 3 and stress_length([True] * 4, [], 20, True) == 4
    assert stress_length([], [], t=20) == 0
