"""Retention and McNemar's test against independent computations."""

import itertools

import numpy as np
import pytest

from lightning_kfac import InputError
from lightning_kfac.math.paired import mcnemar, retention


@pytest.mark.parametrize("right", [1, 7, 20])
def test_identical_answers_keep_everything(right):
    scores = np.arange(20) < right
    left = retention(scores, scores)
    assert left.value == 1 and left.low < 1 < left.high
    assert mcnemar(scores, scores) == 1


def test_identical_graded_answers_keep_everything():
    scores = np.linspace(0, 1, 9)
    left = retention(scores, scores)
    assert (left.value, left.low, left.high) == (1, 1, 1)


def test_nothing_to_keep_has_no_retention():
    assert retention(np.zeros(5), np.array([0, 1, 0, 0, 0])) is None


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 0), (4, 2), (2, 5), (5, 5)])
def test_mcnemar_against_all_ways_to_change(lost, gained):
    """Under the hypothesis each changed answer was lost or gained with equal chance."""
    before = np.r_[np.ones(lost), np.zeros(gained), np.ones(3), np.zeros(2)]
    after = np.r_[np.zeros(lost), np.ones(gained), np.ones(3), np.zeros(2)]
    ways = [sum(way) for way in itertools.product((0, 1), repeat=lost + gained)]
    extreme = abs(lost - (lost + gained) / 2)
    expected = np.mean([abs(number - (lost + gained) / 2) >= extreme for number in ways])
    assert mcnemar(before, after) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    for n in (10, 200, 3000):
        before, after = rng.random((2, n)) < [[0.8], [0.6]]
        lost, gained = (before & ~after).sum(), (after & ~before).sum()
        expected = stats.binomtest(int(min(lost, gained)), int(lost + gained)).pvalue
        assert mcnemar(before, after) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_large_set_is_a_number():
    before, after = np.ones(5000), np.zeros(5000)
    assert mcnemar(before, after) == 0  # 2 ** -4999 is below the smallest float


@pytest.mark.parametrize(
    ("n", "before", "kept", "gained"), [(40, 0.9, 0.5, 0.1), (100, 0.6, 0.9, 0.1), (120, 1.0, 0.03, 0)]
)
def test_intervals_hold_the_truth(n, before, kept, gained):
    """Of 400 simulated sets of right and wrong answers; a standard error of the share is 0.011."""
    truth = (before * kept + (1 - before) * gained) / before
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(400):
        first = rng.random(n) < before
        second = rng.random(n) < np.where(first, kept, gained)
        left = retention(first, second)
        held += left.low <= truth <= left.high
    assert 0.925 <= held / 400 <= 1


def test_pairing_narrows_the_interval():
    """The same rates, from answers that go together and from answers that do not."""
    before = np.r_[np.ones(60), np.zeros(40)]
    together = np.r_[np.ones(50), np.zeros(50)]
    crossed = np.r_[np.ones(30), np.zeros(30), np.ones(20), np.zeros(20)]
    one, other = retention(before, together), retention(before, crossed)
    assert one.value == other.value and one.high - one.low < 0.7 * (other.high - other.low)


def test_the_bootstrap_of_graded_answers_is_paired():
    rng = np.random.default_rng(3)
    before = rng.random(200)
    left = retention(before, 0.7 * before)
    assert (left.value, left.low, left.high) == pytest.approx((0.7, 0.7, 0.7), rel=1e-12)


def test_wrong_scores():
    with pytest.raises(InputError, match="3 answers before, 2 after"):
        retention([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        retention([1, 2], [1, 0])
    with pytest.raises(InputError, match="scores of 0 and 1"):
        mcnemar([0.5, 1], [1, 0])
