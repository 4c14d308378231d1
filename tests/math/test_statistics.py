"""Intervals against their definitions and against plain resampling loops."""

import math
import random
import statistics

import numpy as np
import pytest
import torch

from lightning_kfac.math import statistics as uncertainty
from lightning_kfac.math.statistics import (
    RESAMPLES,
    Estimate,
    Figure,
    interval,
    middle_95,
    paired_difference,
    perplexity,
    rank_correlation,
    rank_correlation_interval,
    recovered_share,
    resampled_perplexities,
    resampled_sums,
    wilson,
)


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


def test_medians_are_those_of_resampling_loops():
    """Of values of which some are -inf, as of sequences that are never drawn."""
    before, after = (losses(41, seed).sums for seed in (0, 1))
    before[:6] = -math.inf
    lists = before.tolist(), after.tolist()
    figures = [Figure(x, torch.ones_like(x), median=True) for x in (before, after)]
    assert [f.value for f in figures] == list(map(statistics.median, lists))
    assert Figure(before[:8], torch.ones(8), median=True).value == -math.inf
    assert Figure(after[:8], torch.ones(8), median=True).value == statistics.median(lists[1][:8])
    assert math.isnan(Figure(after[:0], after[:0], median=True).value)

    # How likely the median of a resample is at most the k-th value: that 21 of 41 draws are among the first k.
    n, ordered = 41, sorted(lists[1])
    below = [
        sum(math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n // 2 + 1, n + 1))
        for k in range(n + 1)
    ]
    error = 4 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    for bound, share in zip(interval(figures[1]), (0.025, 0.975), strict=True):
        k = ordered.index(bound)
        assert below[k] <= share + error and below[k + 1] >= share - error

    def medians(rows):
        return [statistics.median(column[i] for i in rows) for column in lists]

    value, low, high = paired_difference(*figures)
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n)).tolist()
    changes = sorted(b - a for a, b in map(medians, draws))
    assert value == medians(range(n))[1] - medians(range(n))[0]
    assert changes.index(low) <= 0.025 * RESAMPLES <= RESAMPLES - changes[::-1].index(low)
    assert changes.index(high) <= 0.975 * RESAMPLES <= RESAMPLES - changes[::-1].index(high)
    never = Figure(torch.full((9,), -math.inf), torch.ones(9), median=True)
    assert interval(never) == (-math.inf, -math.inf) and all(map(math.isnan, paired_difference(never, never)))


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


# -- figures ---------------------------------------------------------------------------------------------


def test_a_figure_is_a_ratio_of_sums():
    sums, weights = torch.tensor([1.0, 2.0, 4.5]).double(), torch.tensor([2.0, 1.0, 1.0]).double()
    assert Figure(sums, weights).value == 7.5 / 4
    assert Figure(sums, weights, exponential=True).value == pytest.approx(math.exp(7.5 / 4), rel=1e-15)
    assert Figure(sums, weights).rate is False and Figure(sums, weights).exponential is False


def test_a_figure_of_nothing_is_nan_and_says_so_in_silence():
    empty = torch.empty(0, dtype=torch.float64)
    one, none = torch.ones(1).double(), torch.zeros(1).double()
    with np.errstate(all="raise"):
        for exponential in (False, True):
            assert math.isnan(Figure(empty, empty, exponential=exponential).value)
            assert Figure(one, none, exponential=exponential).value == math.inf
            assert all(map(math.isnan, interval(Figure(empty, empty, exponential=exponential))))
        assert Figure(1000 * one, one, exponential=True).value == math.inf
        value, low, high = paired_difference(Figure(empty, empty), Figure(empty, empty))
    assert math.isnan(value) and math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, interval(Figure(empty, empty, rate=True))))


def test_figures_of_many_sums_at_once():
    figure = Figure(torch.ones(1), torch.ones(1), exponential=True)
    found = figure.of(np.array([0.0, 2.0]), np.array([1.0, 4.0]))
    assert found.tolist() == pytest.approx([1, math.exp(0.5)], rel=1e-15)


# -- intervals -------------------------------------------------------------------------------------------


def test_wilson_at_other_levels():
    """z = 1: a rate p lies inside exactly when |successes / n - p| <= sqrt(p (1 - p) / n)."""
    low, high = wilson(37, 100, z=1.0)
    for bound in (low, high):
        assert abs(0.37 - bound) == pytest.approx(math.sqrt(bound * (1 - bound) / 100), rel=1e-12)
    assert low < 0.37 < high
    assert wilson(37, 100) == wilson(37, 100, z=1.959963984540054)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 49, 100, 1000])
def test_wilson_at_the_ends(n):
    """Without a success from exactly 0 to z^2 / (n + z^2), and the mirror image of that."""
    end = uncertainty.Z95**2 / (n + uncertainty.Z95**2)
    assert wilson(0, n) == (0.0, pytest.approx(end, rel=1e-12))
    assert wilson(n, n) == (pytest.approx(1 - end, rel=1e-12), 1.0)


def test_no_bound_of_a_rate_lies_beyond_its_ends():
    """Of so many sequences the upper bound rounds to a unit above 1, if nothing cuts it."""
    n = 2665646190139139
    assert wilson(n - 1, n)[1] == 1.0
    assert 0 <= wilson(1, n)[0] < 1e-15


def test_the_interval_of_a_rate_is_wilsons():
    hits = torch.tensor([1.0, 0, 0, 1, 1, 0, 0]).double()
    assert interval(Figure(hits, torch.ones(7).double(), rate=True)) == wilson(3, 7)


def drawn_rows(n):
    """The draws: one stream of the generator with seed 0, n rows for each of 2000 resamplings."""
    return np.random.default_rng(0).integers(0, n, (2000, n)).tolist()


def quantile(values, share):
    """With linear interpolation between the two nearest of the sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@pytest.mark.parametrize("exponential", [False, True])
def test_interval_and_difference_of_these_very_draws(exponential):
    before, after = losses(9, 0, exponential), losses(9, 1, exponential)
    of = math.exp if exponential else float
    figures, differences = [], []
    columns = [column.tolist() for column in (before.sums, before.weights, after.sums, after.weights)]
    for rows in drawn_rows(9):
        a, a_weight, b, b_weight = (sum(column[i] for i in rows) for column in columns)
        figures.append(of(a / a_weight))
        differences.append(of(b / b_weight) - of(a / a_weight))
    # Two quantiles of sums in another order: nothing but rounding lies between.
    assert interval(before) == (
        pytest.approx(quantile(figures, 0.025), rel=1e-12),
        pytest.approx(quantile(figures, 0.975), rel=1e-12),
    )
    assert paired_difference(before, after) == (
        pytest.approx(after.value - before.value, rel=1e-12),
        pytest.approx(quantile(differences, 0.025), rel=1e-10),
        pytest.approx(quantile(differences, 0.975), rel=1e-10),
    )


@pytest.mark.parametrize("at_once", [1, 5, 7 * 5, 5 * 2000, 5 * 2000 + 1, 1 << 22])
def test_resampled_sums_are_sums_over_drawn_rows(at_once, monkeypatch):
    monkeypatch.setattr(uncertainty, "RESAMPLED_VALUES_AT_ONCE", at_once)
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0], [16.0, 160.0]])
    found = resampled_sums(values)
    assert found.shape == (2000, 2)
    expected = [sum(2**i for i in rows) for rows in drawn_rows(5)]  # whole numbers: exact
    assert found[:, 0].tolist() == expected
    assert found[:, 1].tolist() == [10 * total for total in expected]


@pytest.mark.parametrize(("limit", "expected"), [(12, [(3, 4)] * 666 + [(2, 4)]), (3, [(1, 4)] * 2000)])
def test_resampling_holds_no_more_at_once_than_it_may(limit, expected, monkeypatch):
    """Of 4 rows three resamplings make 12 values; one is made in any case."""
    monkeypatch.setattr(uncertainty, "RESAMPLED_VALUES_AT_ONCE", limit)
    sizes = []

    class Rows(np.ndarray):
        def __getitem__(self, rows):
            sizes.append(rows.shape)
            return self.view(np.ndarray)[rows]

    assert resampled_sums(np.ones((4, 1)).view(Rows)).tolist() == [[4.0]] * 2000
    assert sizes == expected


@pytest.mark.parametrize("columns", [1, 3])
def test_resampled_sums_of_nothing_are_nan(columns):
    found = resampled_sums(np.empty((0, columns)))
    assert found.shape == (2000, columns) and np.isnan(found).all()


def test_middle_95():
    assert middle_95(np.arange(1001.0)[::-1]) == (pytest.approx(25, abs=1e-9), pytest.approx(975, abs=1e-9))
    values = np.random.default_rng(3).normal(size=77)
    low, high = middle_95(values)
    assert low == pytest.approx(quantile(values.tolist(), 0.025), rel=1e-12)
    assert high == pytest.approx(quantile(values.tolist(), 0.975), rel=1e-12)
    assert type(low) is type(high) is float


# -- estimates and perplexities of several models on the same rows ------------------------------------------------


def test_an_estimate_takes_the_nearest_draws():
    """Of 101 draws the 2.5 % and 97.5 % percentiles lie between two; of two as near the even one is taken."""
    draws = np.arange(101.0)[::-1] * 10
    found = Estimate.of(3, draws)
    assert (found.value, found.low, found.high) == (3.0, 20.0, 980.0)
    assert all(type(bound) is float for bound in (found.value, found.low, found.high))
    infinite = Estimate.of(1.0, np.array([1.0, 2.0, math.inf]))
    assert (infinite.low, infinite.high) == (1.0, math.inf)


def test_perplexities_of_several_models():
    losses = np.array([[1.0, 2.0, 3.5], [0.25, 0.5, 0.125]])
    counts = np.array([2, 1, 4])
    found = perplexity(losses, counts)
    assert found.shape == (2,)
    for model in range(2):
        total = sum(losses[model, row] for row in range(3))
        assert found[model] == pytest.approx(math.exp(total / 7), rel=1e-14)
    assert perplexity(losses[0], counts) == pytest.approx(found[0], rel=1e-14)


@pytest.mark.parametrize("seed", [0, 5])
def test_resampled_perplexities_draw_the_same_rows_for_all_models(seed):
    """Against a loop over draws, models and rows, with the row counts that the seed gives."""
    losses = np.array([[1.0, 2.0, 3.5, 0.5], [0.25, 0.5, 0.125, 2.0]])
    counts = np.array([2.0, 1.0, 4.0, 3.0])
    found = resampled_perplexities(losses, counts, draws=6, seed=seed)
    assert found.shape == (6, 2)
    times = np.random.default_rng(seed).multinomial(4, [0.25] * 4, size=6)
    for draw in range(6):
        assert times[draw].sum() == 4
        n_targets = sum(times[draw][row] * counts[row] for row in range(4))
        for model in range(2):
            total = sum(times[draw][row] * losses[model, row] for row in range(4))
            assert found[draw, model] == pytest.approx(math.exp(total / n_targets), rel=1e-13)


def test_resampled_perplexities_by_default():
    losses = np.array([[1.0, 2.0]])
    found = resampled_perplexities(losses, np.ones(2))
    assert len(found) == RESAMPLES
    assert np.array_equal(found, resampled_perplexities(losses, np.ones(2), RESAMPLES, 0))


# -- coverage over documents -----------------------------------------------------------------------------------


def documents(n, repetitions, seed):
    """Lengths, losses before and after of n documents [n, repetitions]: each has a difficulty and a change of its own.

    Lengths are lognormal with an end, as where a budget is spread over documents.
    """
    rng = np.random.default_rng(seed)
    shape = (n, repetitions)
    lengths = 1 + np.minimum(rng.lognormal(5.5, 1.0, shape), 500).round()
    before = lengths * (3 + 0.5 * rng.standard_normal(shape)) + 2 * np.sqrt(lengths) * rng.standard_normal(shape)
    after = before + lengths * (0.05 + 0.08 * rng.standard_normal(shape))
    return lengths, before, after


def true_figures():
    """Perplexity and its change over a million documents."""
    lengths, before, after = (column.sum() for column in documents(1_000_000, 1, 1))
    return math.exp(before / lengths), math.exp(after / lengths) - math.exp(before / lengths)


def covered(n, repetitions):
    """How often the intervals of n documents hold the true perplexity, and its true change."""
    perplexity, change = true_figures()
    times = np.stack([np.bincount(rows, minlength=n) for rows in drawn_rows(n)]).astype(float)
    held = np.zeros(2)
    for seed in range(repetitions // 500):
        lengths, before, after = documents(n, 500, 2 + seed)
        total = times @ lengths
        of_before, of_after = np.exp(times @ before / total), np.exp(times @ after / total)
        low, high = np.quantile(of_before, [0.025, 0.975], axis=0)
        least, most = np.quantile(of_after - of_before, [0.025, 0.975], axis=0)
        held += ((low <= perplexity) & (perplexity <= high)).sum(), ((least <= change) & (change <= most)).sum()
        columns = [torch.from_numpy(column[:, 0].copy()) for column in (before, after, lengths)]
        figures = [Figure(column, columns[2], exponential=True) for column in columns[:2]]
        assert interval(figures[0]) == pytest.approx((low[0], high[0]), rel=1e-9)  # that is what is simulated
        assert paired_difference(*figures)[1:] == pytest.approx((least[0], most[0]), rel=1e-7)
    return held / repetitions


def test_intervals_over_documents_cover():
    """Of 200 documents 94 to 96 % of what is called 95 % (standard deviation 0.3 %), of few less: docs/measuring.md."""
    of_200 = covered(200, 4000)
    assert (of_200 >= 0.94).all() and (of_200 <= 0.96).all()
    of_20, of_50 = covered(20, 4000), covered(50, 4000)
    assert of_20 == pytest.approx([0.91, 0.91], abs=0.01) and of_50 == pytest.approx([0.93, 0.93], abs=0.01)


def test_rows_of_few_documents_promise_too_much():
    """What was done before: of four documents in 100 rows, rows hold the truth half of the time at best."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        rows = np.repeat(3 + 0.5 * rng.standard_normal(4), 25) + 0.3 * rng.standard_normal(100)
        low, high = interval(Figure(torch.from_numpy(rows), torch.ones(100).double()))
        held += low <= 3 <= high
    assert held < 100


@pytest.mark.parametrize("exponential", [False, True])
def test_one_document_has_no_interval(exponential):
    figure = losses(1, 0, exponential)
    assert all(map(math.isnan, interval(figure)))
    value, low, high = paired_difference(figure, figure)
    assert value == 0 and math.isnan(low) and math.isnan(high)
    assert not any(map(math.isnan, interval(losses(2, 0, exponential))))
    assert np.isnan(resampled_perplexities(np.ones((3, 1)), np.ones(1), draws=5)).tolist() == [[True] * 3] * 5
    assert not np.isnan(resampled_perplexities(np.ones((3, 2)), np.ones(2), draws=5)).any()


# -- what an attack brings back -----------------------------------------------------------------------------------


def rates(*columns):
    """Figures of zeros and ones."""
    return [Figure(torch.tensor(c).double(), torch.ones(len(c)).double(), rate=True) for c in columns]


def simulated(n=60, seed=5, chances=(0.95, 0.1, 0.4)):
    rng = np.random.default_rng(seed)
    return rates(*((rng.random(n) < chance).astype(float) for chance in chances))


def test_recovered_share_is_that_of_a_plain_loop():
    figures = simulated()
    unedited, edited, attacked = (figure.sums.numpy() for figure in figures)
    shares = []
    for rows in drawn_rows(60):
        top, bottom = (attacked[rows] - edited[rows]).mean(), (unedited[rows] - edited[rows]).mean()
        shares.append(top / bottom)
    shares.sort()
    share, low, high = recovered_share(*figures)
    assert share == pytest.approx((attacked.mean() - edited.mean()) / (unedited.mean() - edited.mean()), rel=1e-12)
    assert 0 < low < share < high < 1
    place = 0.025 * (RESAMPLES - 1)
    assert low == pytest.approx(shares[round(place)]) and high == pytest.approx(shares[round(RESAMPLES - 1 - place)])


def test_recovered_share_of_a_figure_that_rises_under_suppression():
    """A distance is 1 less a similarity, so the share is the same."""
    figures = simulated()
    distances = [Figure(1 - f.sums, f.weights) for f in figures]
    assert recovered_share(*distances, falls=False) == pytest.approx(recovered_share(*figures), rel=1e-9)
    assert recovered_share(*distances) is None and recovered_share(*figures, falls=False) is None


def test_an_attack_without_effect_recovers_exactly_nothing():
    unedited, edited, _ = simulated()
    assert recovered_share(unedited, edited, edited) == (0.0, 0.0, 0.0)
    assert recovered_share(unedited, edited, unedited)[0] == 1.0
    one_of_many = rates([1.0] * 20, [0.0] + [1.0] * 19)
    assert recovered_share(*one_of_many, one_of_many[1]) == (0.0, 0.0, 0.0)  # many resamples suppress nothing


def test_where_nothing_was_suppressed_there_is_no_share():
    unedited, edited, attacked = simulated()
    assert recovered_share(unedited, unedited, attacked) is None
    assert recovered_share(edited, unedited, attacked) is None
    empty = rates([], [], [])
    assert recovered_share(*empty) is None


def test_few_sequences_do_not_bound_a_share():
    """One of 20 sequences was suppressed: a third of the resamples do not have it."""
    unedited, edited, attacked = rates([1.0] * 20, [0.0] + [1.0] * 19, [1.0] * 19 + [0.0])
    share, low, high = recovered_share(unedited, edited, attacked)
    assert (share, low, high) == (0.0, -math.inf, math.inf)
    assert all(map(math.isnan, recovered_share(*rates([1.0], [0.0], [1.0]))[1:]))
    with pytest.raises(ValueError, match="other sequences"):
        recovered_share(unedited, edited, rates([1.0])[0])


def test_rank_correlation_by_hand():
    """Against the definition on mean ranks; ties on both sides; none where one side has no order."""
    x, y = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 1.0, 4.0, 2.0, 8.0]

    def ranks(values):
        return [sum(other < v for other in values) + (sum(other == v for other in values) - 1) / 2 for v in values]

    a, b = ranks(x), ranks(y)
    mean = sum(a) / len(a)
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    spread = math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))
    assert rank_correlation(x, y) == pytest.approx(covariance / spread, abs=1e-12)
    assert rank_correlation([1, 2, 3], [5, 6, 9]) == 1 and rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_rank_correlation_against_torchmetrics():
    spearman = pytest.importorskip("torchmetrics.functional").spearman_corrcoef
    rng = np.random.default_rng(0)
    for n in (5, 30):
        x, y = rng.normal(size=(2, n))
        expected = spearman(torch.from_numpy(x).double(), torch.from_numpy(y + x).double()).item()
        assert rank_correlation(x, y + x) == pytest.approx(expected, abs=1e-6)


def test_rank_correlation_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(1)
    for n in (4, 9, 50):
        x, y = rng.integers(0, 5, size=(2, n))  # with ties
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize(("n", "strength"), [(8, 0.0), (12, 1.0), (40, 0.6)])
def test_intervals_of_rank_correlations_hold_the_truth(n, strength):
    """Spearman's correlation of a normal pair is 6 / pi arcsin(r / 2) (Pearson, 1907); of few pairs a little lower."""
    r = strength / np.hypot(1, strength)
    truth = 6 / np.pi * np.arcsin(r / 2)
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(400):
        x = rng.normal(size=n)
        low, high = rank_correlation_interval(rank_correlation(x, strength * x + rng.normal(size=n)), n)
        held += low <= truth <= high
    assert 0.925 <= held / 400 <= 1


def test_a_perfect_order_of_few_pairs_proves_little():
    low, high = rank_correlation_interval(1.0, 6)
    assert 0 < low < 0.95 and high == 1
    assert rank_correlation_interval(-1.0, 6) == (-high, -low)
    assert all(map(math.isnan, rank_correlation_interval(0.5, 3)))
