"""Intervals against their definitions and against plain resampling loops."""

import math
import random

import pytest
import torch

from lightning_kfac.math import statistics as uncertainty
from lightning_kfac.math.statistics import Figure, interval, paired_difference, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 100), (1, 100), (37, 100), (100, 100), (1, 3), (5, 7)])
def test_wilson_bounds_are_where_the_test_of_the_rate_turns(successes, n):
    """A rate p lies inside exactly when |successes / n - p| <= z sqrt(p (1 - p) / n)."""
    low, high = wilson(successes, n)
    for bound in (low, high):
        if 0 < bound < 1:
            distance = abs(successes / n - bound)
            assert distance == pytest.approx(uncertainty.Z95 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert 0 <= low <= successes / n <= high <= 1
    assert (low == 0) == (successes == 0) and (high == 1) == (successes == n)


def test_wilson_without_sequences():
    assert all(map(math.isnan, wilson(0, 0)))


def test_published_wilson_interval():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 15 of 148 gives 0.0624 to 0.1605."""
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(15, 148) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))


def losses(n, seed, exponential=True):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 30, (n,), generator=generator).double()
    return Figure(counts * torch.rand(n, generator=generator).double() * 4, counts, exponential=exponential)


def resample(n, statistic, rounds=4000):
    """A loop over resamplings with Python's own generator."""
    rng = random.Random(1)
    values = sorted(statistic([rng.randrange(n) for _ in range(n)]) for _ in range(rounds))
    return values[int(0.025 * rounds)], values[int(0.975 * rounds)]


def test_bootstrap_of_perplexity_is_a_resampling_loop():
    figure = losses(40, 0)
    sums, weights = figure.sums.tolist(), figure.weights.tolist()
    assert figure.value == pytest.approx(math.exp(sum(sums) / sum(weights)), rel=1e-14)
    low, high = resample(40, lambda rows: math.exp(sum(sums[i] for i in rows) / sum(weights[i] for i in rows)))
    found = interval(figure)
    width = high - low  # two random samplings of the same distribution: their quantiles agree to a few percent
    assert found == (pytest.approx(low, abs=0.06 * width), pytest.approx(high, abs=0.06 * width))


def test_paired_difference_is_a_resampling_loop_over_the_same_rows():
    before, noise = losses(40, 0), losses(40, 1)
    after = before._replace(sums=before.sums + 0.02 * noise.sums)
    lists = [c.tolist() for c in (before.sums, after.sums, before.weights)]

    def difference(rows):
        a, b, w = (sum(column[i] for i in rows) for column in lists)
        return math.exp(b / w) - math.exp(a / w)

    value, low, high = paired_difference(before, after)
    assert value == pytest.approx(difference(range(40)), rel=1e-12)
    expected = resample(40, difference)
    width = expected[1] - expected[0]
    assert (low, high) == tuple(pytest.approx(bound, abs=0.06 * width) for bound in expected)
    # Pairing is what makes it narrow: either interval alone is far wider.
    assert high - low < 0.2 * (interval(before)[1] - interval(before)[0])


def test_chunks_of_the_resampling_change_nothing_but_the_draws(monkeypatch):
    figure = losses(40, 0, exponential=False)
    whole = interval(figure)
    monkeypatch.setattr(uncertainty, "RESAMPLED_VALUES_AT_ONCE", 40 * 7)
    parts = interval(figure)
    assert parts == pytest.approx(whole, rel=1e-12)


def test_coverage_of_the_paired_bootstrap():
    """Of 200 samples whose true difference is known, about 95 % of the intervals hold it."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        one, before = torch.ones(60).double(), torch.rand(60, generator=generator).double()
        after = before + 0.1 + 0.3 * torch.randn(60, generator=generator).double()
        _, low, high = paired_difference(Figure(before, one), Figure(after, one))
        inside += low <= 0.1 <= high
    assert 178 <= inside <= 199  # binomial, 3.5 standard deviations around 0.94


def test_equal_measurements_differ_by_exactly_nothing():
    figure = losses(20, 3)
    assert paired_difference(figure, figure) == (0.0, 0.0, 0.0)


def test_wrong_pairs():
    with pytest.raises(ValueError, match="20 sequences before, 19 after"):
        paired_difference(losses(20, 0), losses(19, 0))
