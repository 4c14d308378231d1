"""AUCs against counted pairs, their intervals against the definition and against simulated sets."""

import math
import random
from fractions import Fraction
from statistics import NormalDist, mean

import numpy as np
import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.math import separation
from lightning_kfac.math.separation import Z95, auc, auc_difference, auc_interval, placements, tpr_at_fpr
from lightning_kfac.math.statistics import Figure, interval, paired_difference

NORMAL = NormalDist()
SETS = 300


def scores(seed, m=23, n=31, shift=0.8, whole=True):
    """Many of them tied, where they are whole."""
    rng = np.random.default_rng(seed)
    members = 2 * rng.standard_normal(m) + shift
    others = 2 * rng.standard_normal(n)
    return (members.round(), others.round()) if whole else (members, others)


def above(one, other):
    return 1.0 if one > other else 0.5 if one == other else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs_and_ranks(seed):
    members, others = scores(seed)
    pairs = [above(a, b) for a in members.tolist() for b in others.tolist()]
    assert auc(members, others) == pytest.approx(mean(pairs), abs=1e-12)
    # The rank of a score is its place among all, of equal ones the mean place.
    everyone = sorted([*members.tolist(), *others.tolist()])
    ranks = [mean(i for i, x in enumerate(everyone, start=1) if x == a) for a in members.tolist()]
    m, n = len(members), len(others)
    assert auc(members, others) == pytest.approx((sum(ranks) - m * (m + 1) / 2) / (m * n), abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - auc(members, others), abs=1e-12)


def test_auc_of_what_is_apart_tied_or_infinite():
    assert auc([2, 3], [0, 1]) == 1.0 and auc([0, 1], [2, 3]) == 0.0
    assert auc([1, 1, 1], [1, 1]) == 0.5
    assert auc([-math.inf, 1], [-math.inf, 0]) == 0.625
    assert auc(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_covariances_are_delongs(seed):
    """Sums over placements, each counted pair by pair."""
    first, second = scores(seed), scores(seed + 10)
    found = []
    for members, others in (first, second):
        of_members = [mean(above(a, b) for b in others.tolist()) for a in members.tolist()]
        of_others = [mean(above(a, b) for a in members.tolist()) for b in others.tolist()]
        found.append((of_members, of_others))

    def covariance(x, y):
        return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True)) / (len(x) - 1)

    expected = sum(covariance(x, y) / len(x) for x, y in zip(*found, strict=True))
    assert placements(*first).covariance(placements(*second)) == pytest.approx(expected, rel=1e-9)
    assert placements(*first).members.tolist() == pytest.approx(found[0][0])
    assert placements(*first).others.tolist() == pytest.approx(found[0][1])


def hanley_mcneil(a, m, n):
    """Published form: Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A), with (m + n) / 2 for both sizes in the products."""
    each = (m + n) / 2 - 1
    q1 = a / (2 - a) - a * a
    q2 = 2 * a * a / (1 + a) - a * a
    return (a * (1 - a) + each * (q1 + q2)) / (m * n)


@pytest.mark.parametrize(("m", "n", "shift"), [(23, 31, 0.8), (10, 10, 1.5), (60, 15, 3.0), (40, 40, -1.0)])
def test_bounds_are_where_the_test_of_the_auc_turns(m, n, shift):
    members, others = scores(4, m, n, shift)
    found = placements(members, others)
    overlapping = min(m, n) * min(found.auc, 1 - found.auc)
    weight = overlapping / (overlapping + 0.5)
    ratio = 1 - weight + weight * found.covariance(found) / hanley_mcneil(found.auc, m, n)
    low, high = auc_interval(members, others)
    assert 0 <= low < found.auc < high < 1
    for bound in (low, high):
        error = math.sqrt(ratio * hanley_mcneil(bound, m, n))
        assert abs(bound - found.auc) == pytest.approx(Z95 * error, rel=1e-9)


def test_the_interval_of_sets_that_are_apart_has_a_width():
    low, high = auc_interval(range(10, 20), range(10))
    assert high == 1.0 and 0.7 < low < 0.9
    assert Z95 * math.sqrt(hanley_mcneil(low, 10, 10)) == pytest.approx(1 - low, rel=1e-9)
    assert auc_interval(range(10), range(10, 20)) == (0.0, pytest.approx(1 - low))
    wide, _ = auc_interval(range(100, 200), range(100))
    assert wide > low


def simulated(area, deviation, m, n, rng):
    """Members from a normal distribution against others from the standard one, with this AUC."""
    shift = NORMAL.inv_cdf(area) * math.sqrt(1 + deviation**2)
    return shift + deviation * rng.standard_normal(m), rng.standard_normal(n)


@pytest.mark.parametrize(
    ("area", "deviation", "m", "n"),
    [
        (0.5, 1, 10, 10),
        (0.5, 1, 100, 100),
        (0.7, 2, 20, 20),
        (0.7, 1, 15, 60),
        (0.9, 1, 50, 50),
        (0.95, 1, 20, 20),
        (0.98, 0.5, 50, 50),
        (0.98, 2, 100, 100),
        (0.98, 1, 200, 200),
        (0.99, 2, 100, 100),
    ],
)
def test_intervals_hold_the_truth(area, deviation, m, n):
    rng = np.random.default_rng(5)
    intervals = [auc_interval(*simulated(area, deviation, m, n, rng)) for _ in range(SETS)]
    covered = mean(low <= area <= high for low, high in intervals)
    assert 0.92 <= covered <= 0.98


def test_shuffled_labels_say_nothing():
    """Real scores of two classes, dealt out anew 300 times."""
    members, others = scores(7, 40, 60, 2.0, whole=False)
    assert auc_interval(members, others)[0] > 0.5
    everyone = [*members.tolist(), *others.tolist()]
    rng = random.Random(3)
    covered = []
    for _ in range(SETS):
        rng.shuffle(everyone)
        low, high = auc_interval(everyone[:40], everyone[40:])
        covered.append(low <= 0.5 <= high)
    assert 0.92 <= mean(covered) <= 0.98


def test_changes_against_a_plain_bootstrap():
    before = scores(1, 60, 50, 3.0, whole=False)
    noise = scores(2, 60, 50, 0.0, whole=False)
    after = tuple(0.6 * x + 0.4 * y for x, y in zip(before, noise, strict=True))
    change, low, high = auc_difference(before, after)
    assert change == pytest.approx(auc(*after) - auc(*before))
    rng = random.Random(1)
    drawn = []
    for _ in range(1000):
        i = rng.choices(range(60), k=60)
        j = rng.choices(range(50), k=50)
        drawn.append(auc(after[0][i], after[1][j]) - auc(before[0][i], before[1][j]))
    drawn.sort()
    assert low == pytest.approx(drawn[25], abs=0.02) and high == pytest.approx(drawn[975], abs=0.02)
    # Two scores that move together tell more than two that do not.
    alone, far = auc_interval(*before), auc_interval(*after)
    assert high - low < math.hypot(alone[1] - alone[0], far[1] - far[0])


def test_bounds_of_a_change_join_those_of_the_two():
    before, after = scores(1, 60, 50, 3.0), scores(1, 60, 50, 1.0)
    first, second = placements(*before), placements(*after)
    shared = first.covariance(second) / math.sqrt(first.covariance(first) * second.covariance(second))
    (l1, u1), (l2, u2) = auc_interval(*before), auc_interval(*after)
    change, low, high = auc_difference(before, after)

    def joined(a, b):
        return math.sqrt(a * a + b * b - 2 * shared * a * b)

    assert change - low == pytest.approx(joined(second.auc - l2, u1 - first.auc))
    assert high - change == pytest.approx(joined(u2 - second.auc, first.auc - l1))


@pytest.mark.parametrize(("area", "after", "m"), [(0.95, 0.7, 40), (0.7, 0.7, 100), (0.98, 0.9, 100)])
def test_changes_hold_the_truth(area, after, m):
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(SETS):
        shared = rng.standard_normal((2, m))
        pair = []
        for target in (area, after):
            own = (shared + rng.standard_normal((2, m))) / math.sqrt(2)
            pair.append((own[0] + NORMAL.inv_cdf(target) * math.sqrt(2), own[1]))
        _, low, high = auc_difference(*pair)
        covered.append(low <= after - area <= high)
    assert 0.92 <= mean(covered) <= 0.98


def test_a_change_from_what_is_apart_joins_bounds_without_a_correlation():
    before, after = (range(10, 20), range(10)), scores(1, 10, 10, 1.0)
    first, second = auc_interval(*before), auc_interval(*after)
    change, low, high = auc_difference(before, after)
    value = auc(*after)
    assert change - low == pytest.approx(math.hypot(value - second[0], first[1] - 1))
    assert high - change == pytest.approx(math.hypot(second[1] - value, 1 - first[0]))


def test_two_texts_a_class_have_an_interval():
    low, high = auc_interval([3.0, 1.0], [2.0, 0.0])
    assert 0 < low < 0.75 < high < 1


def test_scores_of_other_types():
    half, third = Fraction(1, 2), Fraction(1, 3)
    assert auc([half], [third]) == tpr_at_fpr([half], [third]) == 1.0


def test_a_change_to_itself_is_none():
    whole = scores(3)
    change, low, high = auc_difference(whole, whole)
    assert (change, low, high) == (0.0, pytest.approx(0, abs=0.1), pytest.approx(0, abs=0.1))
    apart = [3.0, 4.0, 5.0], [0.0, 1.0, 2.0]
    assert auc_difference(apart, apart)[0] == 0.0


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.29, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_rate_at_few_false_alarms_is_that_of_the_best_threshold(seed, fpr):
    members, others = scores(seed, 40, 100, 2.0)
    best = 0.0
    for threshold in [*members.tolist(), *others.tolist(), math.inf]:
        if (others >= threshold).mean() <= fpr + 1e-12:
            best = max(best, float((members >= threshold).mean()))
    assert tpr_at_fpr(members, others, fpr) == pytest.approx(best)


def test_of_few_others_none_may_be_a_false_alarm():
    assert tpr_at_fpr([3.0, 2.0], [2.5] + 98 * [0.0]) == 0.5
    assert tpr_at_fpr([3.0, 2.0], [2.5] + 99 * [0.0]) == 1.0


def test_one_text_tells_no_interval():
    assert all(map(math.isnan, auc_interval([1.0], [0.0, 2.0])))
    assert all(map(math.isnan, auc_interval([1.0, 2.0], [0.0])))
    change, *bounds = auc_difference(([1.0], [0.0]), ([0.0], [1.0]))
    assert change == -1 and all(map(math.isnan, bounds))


@pytest.mark.parametrize("function", [auc, auc_interval, tpr_at_fpr])
def test_wrong_sets(function):
    with pytest.raises(InputError, match="no members"):
        function([], [1.0])
    with pytest.raises(InputError, match="no others"):
        function([1.0], [])
    with pytest.raises(InputError, match="members is no number"):
        function([math.nan], [1.0])


def test_wrong_rates_and_pairs():
    for rate in (-0.1, 1.0):
        with pytest.raises(InputError, match="false alarms"):
            tpr_at_fpr([1.0], [0.0], rate)
    with pytest.raises(ValueError, match="not the same"):
        auc_difference(([1.0, 2.0], [0.0]), ([1.0], [0.0]))


def test_as_a_figure():
    values = torch.tensor([3.0, 0.0, 2.0, 1.0, 5.0]).double()
    members = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]).double()
    figure = Figure(values, members, auc=True)
    assert figure.value == pytest.approx(4 / 6)
    assert interval(figure) == auc_interval([3.0, 2.0], [0.0, 1.0, 5.0])
    after = Figure(-values, members, auc=True)
    found = paired_difference(figure, after)
    assert found == auc_difference(([3.0, 2.0], [0.0, 1.0, 5.0]), ([-3.0, -2.0], [0.0, -1.0, -5.0]))
    alone = Figure(values, torch.ones(5).double(), auc=True)
    assert math.isnan(alone.value) and all(map(math.isnan, interval(alone)))


def test_constants():
    """What no mutation reaches."""
    assert pytest.approx(NORMAL.inv_cdf(0.975)) == Z95
    assert (separation.FPR, separation.MODELLED) == (0.01, 0.5)
