"""Scores of one text against loops over the vocabulary and over tokens."""

import math
import zlib

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional import leaks
from lightning_kfac.metrics.functional.leaks import (
    exact_match,
    extraction_strength,
    mean_loss,
    min_k,
    min_k_plus_plus,
    reference_ratio,
    token_statistics,
    zlib_ratio,
)
from tests.common import generator


def by_loop(row, token):
    """log p of a token, mean and deviation of log p, and whether it is the likeliest; exact sums in float64."""
    best = max(row)
    total = math.fsum(math.exp(value - best) for value in row)
    log_p = [value - best - math.log(total) for value in row]
    weights = [math.exp(value) for value in log_p]
    mean = math.fsum(p * value for p, value in zip(weights, log_p, strict=True) if p)
    variance = math.fsum(p * (value - mean) ** 2 for p, value in zip(weights, log_p, strict=True) if p)
    return log_p[token], mean, math.sqrt(variance), row.index(best) == token


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 300])
def test_statistics_of_tokens(vocabulary, dtype, monkeypatch):
    monkeypatch.setattr(leaks, "VALUES_AT_ONCE", 1000)  # three positions at once, or one
    logits = (4 * torch.randn(4, 7, vocabulary, generator=generator())).to(dtype)
    logits[0] = logits[0].round()  # some ties
    logits[1, :, 1:] = logits[1, :, 1:].masked_fill(
        torch.rand(7, vocabulary - 1, generator=generator(2)) < 0.5, -math.inf
    )
    wanted = torch.randint(0, vocabulary, (4, 7), generator=generator(1))
    wanted[2] = logits[2].double().argmax(-1)
    found = token_statistics(logits, wanted)
    expected = [
        by_loop(row, t) for row, t in zip(logits.flatten(0, 1).tolist(), wanted.flatten().tolist(), strict=True)
    ]
    for values, column in zip(found, zip(*expected, strict=True), strict=True):
        assert values.shape == wanted.shape
        assert values.flatten().tolist() == pytest.approx(list(column), abs=1e-10)
    assert found.hit[2].all() and found.log_p.dtype == found.deviation.dtype == torch.float64


def test_statistics_of_no_token():
    found = token_statistics(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long))
    assert [part.shape for part in found] == [(2, 0)] * 4
    assert [part.dtype for part in found] == [*3 * [torch.float64], torch.bool]


def test_a_certain_model():
    logits = torch.tensor([[0.0, -math.inf]]).repeat(2, 1)
    found = token_statistics(logits, torch.tensor([0, 1]))
    assert found.log_p.tolist() == [0, -math.inf] and found.deviation.tolist() == [0, 0]
    assert min_k_plus_plus(*(part[:1] for part in found[:3])) == 0
    assert min_k_plus_plus(*(part[1:] for part in found[:3])) == -math.inf


@pytest.mark.parametrize(("length", "k", "count"), [(1, 0.2, 1), (4, 0.2, 1), (10, 0.2, 2), (100, 0.29, 29), (7, 1, 7)])
def test_min_k_is_the_mean_of_the_lowest(length, k, count):
    log_p = -torch.rand(length, generator=generator(), dtype=torch.float64)
    assert min_k(log_p, k) == pytest.approx(math.fsum(sorted(log_p.tolist())[:count]) / count)
    mean = -torch.rand(length, generator=generator(1), dtype=torch.float64)
    deviation = 0.1 + torch.rand(length, generator=generator(2), dtype=torch.float64)
    scaled = sorted((p - m) / d for p, m, d in zip(log_p.tolist(), mean.tolist(), deviation.tolist(), strict=True))
    assert min_k_plus_plus(log_p, mean, deviation, k) == pytest.approx(math.fsum(scaled[:count]) / count)


def test_the_share_is_a_fifth_unless_said():
    log_p = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -10.0])
    assert min_k(log_p) == -9.5
    assert min_k_plus_plus(log_p, torch.zeros(10), torch.ones(10)) == -9.5


def test_ratios():
    log_p = torch.tensor([-0.5, -1.5, -4.0]).double()
    assert mean_loss(log_p) == 2.0
    text = "déjà vu, déjà vu, déjà vu"
    assert zlib_ratio(2.0, text) == 2.0 / len(zlib.compress(text.encode()))
    assert zlib_ratio(2.0, 40 * "abc ") > zlib_ratio(2.0, "".join(map(chr, range(160))))
    assert zlib_ratio(1.0, "\ud800") > 0  # half of a character, as a decoder may leave it
    # The logarithm of the ratio of perplexities.
    assert reference_ratio(2.0, 3.0) == pytest.approx(math.log(math.exp(2.0) / math.exp(3.0)))


@pytest.mark.parametrize("seed", range(20))
def test_matches_by_definition(seed):
    predicted = torch.randint(0, 2, (9,), generator=generator(seed)).tolist()
    gold = torch.randint(0, 2, (9,), generator=generator(seed + 100)).tolist()
    gold[4:] = predicted[4:] if seed % 2 else gold[4:]
    hit = torch.tensor(predicted) == torch.tensor(gold)
    assert exact_match(hit) == sum(p == g for p, g in zip(predicted, gold, strict=True)) / 9
    needed = next(k for k in range(10) if predicted[k:] == gold[k:])
    assert extraction_strength(hit) == pytest.approx(1 - needed / 9)


@pytest.mark.parametrize("function", [mean_loss, min_k, exact_match, extraction_strength])
def test_nothing_to_score(function):
    with pytest.raises(InputError, match="without a token"):
        function(torch.zeros(0))
    with pytest.raises(InputError, match="without a token"):
        min_k_plus_plus(*torch.zeros(3, 0))


@pytest.mark.parametrize("k", [0, -1, 1.5, math.nan])
def test_wrong_shares(k):
    with pytest.raises(InputError, match=r"leaks\.k"):
        min_k(torch.zeros(3), k)
