"""What each rank costs and recovers."""

import json
import math

import numpy as np
import pytest

from lightning_kfac.attention.comparison import compare, lowrank
from lightning_kfac.math.statistics import Estimate, resampled_perplexities
from tests.attention.common import noisy


def test_paired_bootstrap_gives_the_standard_error_of_differences():
    (a, b), counts = noisy(0, 0.5)
    draws = np.log(resampled_perplexities(np.stack([a, b]), counts))
    difference = (b - a) / 10
    assert draws.shape == (2000, 2)
    assert (draws[:, 1] - draws[:, 0]).std() == pytest.approx(difference.std() / math.sqrt(len(a)), rel=0.1)
    again = resampled_perplexities(np.stack([a, b]), counts)
    assert np.array_equal(np.log(again), draws)  # seeded


def test_comparison_recovers_and_finds_the_smallest_rank():
    losses, counts = noisy(0, 0.5, 0.4, 0.02, 0.03, 0, noise=0.01)
    names = ["baseline", "top1", lowrank(1), lowrank(4), lowrank(8), "full"]
    found = compare(dict(zip(names, losses, strict=True)), counts, [1, 4, 8])
    ppl = {name: math.exp(loss.sum() / counts.sum()) for name, loss in zip(names, losses, strict=True)}
    for name in names:
        assert found.costs[name].perplexity == pytest.approx(ppl[name])
        assert found.costs[name].change.value == pytest.approx(ppl[name] / ppl["baseline"] - 1)
    for rank in (1, 4, 8):
        share = (ppl["top1"] - ppl[lowrank(rank)]) / (ppl["top1"] - ppl["baseline"])
        assert found.recovered[rank].value == pytest.approx(share)
        assert found.recovered[rank].low <= share <= found.recovered[rank].high
    # Rank 8 recovers less than rank 4: nothing is assumed to be monotone.
    assert found.enough == Estimate(4, 4, 4) and found.recovered[8].value < found.recovered[4].value


def test_nothing_to_recover_where_top1_costs_no_more_than_its_interval():
    losses, counts = noisy(0, 0.001, 0.001, 0)
    found = compare(dict(zip(["baseline", "top1", lowrank(1), "full"], losses, strict=True)), counts, [1])
    assert found.costs["top1"].change.low <= 0 and found.recovered is None and found.enough is None


def test_a_loss_that_no_rank_recovers():
    losses, counts = noisy(0, 0.5, 0.4, 0, noise=0.01)
    found = compare(dict(zip(["baseline", "top1", lowrank(1), "full"], losses, strict=True)), counts, [1])
    assert found.enough == Estimate(math.inf, math.inf, math.inf)
    assert json.loads(json.dumps(found.to_dict()))["enough"] == dict.fromkeys(("value", "low", "high"))
    assert Estimate.of(1, np.array([math.inf, 1, 2])).high == math.inf
