"""Probabilities of drawn tokens against sorted lists, transformers' own processors, fractions and counting."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional import extraction
from lightning_kfac.metrics.functional.extraction import (
    Decoding,
    expected_share,
    extracted_in,
    extraction_rates,
    log_probabilities,
    reaches,
    top_values,
    tries_needed,
)
from tests.common import generator

SCHEMES = [
    Decoding(),
    Decoding(top_k=1),
    Decoding(top_k=None),
    Decoding(0.3, 7, 0.8),
    Decoding(2.5, None, 0.6),
    Decoding(1.7, 5, 1e-9),
    Decoding(0.01, 3, 0.99),
]


def by_list(row, token, decoding):
    """log P of one token: tokens in order of rank, cut, summed with exact additions."""
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))[: decoding.top_k]
    weights = [math.exp((row[v] - row[order[0]]) / decoding.temperature) for v in order]
    total = math.fsum(weights)
    kept = [v for i, v in enumerate(order) if math.fsum(weights[:i]) / total < decoding.top_p]
    if token not in kept:
        return -math.inf
    return (row[token] - row[order[0]]) / decoding.temperature - math.log(math.fsum(weights[: len(kept)]))


@pytest.mark.parametrize("decoding", SCHEMES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 6, 61, 1000])
def test_probabilities_are_those_of_sorted_lists(decoding, vocabulary):
    logits = 2 * torch.randn(40, vocabulary, generator=generator(), dtype=torch.float64)
    # Half of the positions have ties everywhere, the border of top-k among them.
    logits[::2] = logits[::2].round()
    wanted = torch.randint(0, vocabulary, (40,), generator=generator(1))
    first = torch.arange(20)
    wanted[:20] = logits[:20].argsort(descending=True)[first, first % min(8, vocabulary)]  # some of each rank
    found = log_probabilities(logits.view(8, 5, -1), wanted.view(8, 5), decoding).flatten().tolist()
    expected = [by_list(row, token, decoding) for row, token in zip(logits.tolist(), wanted.tolist(), strict=True)]
    assert found == pytest.approx(expected, abs=1e-12) and max(found) <= 0
    assert any(map(math.isfinite, found))


def test_of_tied_tokens_at_the_border_those_with_the_lowest_ids_are_drawn():
    logits = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0])
    found = log_probabilities(logits.repeat(6, 1), torch.arange(6), Decoding(top_k=4)).exp()
    total = math.exp(1) * 2 + math.exp(2) + math.exp(3)
    kept = [math.exp(1), math.exp(2), math.exp(1), math.exp(3), 0, 0]
    assert found.tolist() == pytest.approx([x / total for x in kept], rel=1e-12)
    # All alike: half of the mass is the first two.
    even = log_probabilities(torch.zeros(4, 4), torch.arange(4), Decoding(top_p=0.5)).exp()
    assert even.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("decoding", SCHEMES, ids=str)
def test_probabilities_are_those_of_transformers(decoding):
    scores = 3 * torch.randn(50, 90, generator=generator(2), dtype=torch.float64)
    processed = TemperatureLogitsWarper(decoding.temperature)(None, scores)
    if decoding.top_k is not None:
        processed = TopKLogitsWarper(decoding.top_k)(None, processed)
    if decoding.top_p < 1:
        processed = TopPLogitsWarper(decoding.top_p)(None, processed)
    expected = processed.log_softmax(-1)
    rows, tokens = (x.flatten() for x in torch.meshgrid(torch.arange(50), torch.arange(90), indexing="ij"))
    found = log_probabilities(scores[rows], tokens, decoding).view(50, 90)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.allclose(found.exp(), expected.exp(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoding", SCHEMES, ids=str)
def test_all_suffixes_together_are_certain(decoding):
    """125 suffixes of three tokens; each token's distribution depends on those before it."""
    tables = 2 * torch.randn(1 + 5 + 25, 5, generator=generator(3), dtype=torch.float64)
    total = 0.0
    for a, b, c in itertools.product(range(5), repeat=3):
        logits = tables[[0, 1 + a, 6 + 5 * a + b]]
        total += log_probabilities(logits, torch.tensor([a, b, c]), decoding).sum().exp().item()
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("vocabulary", "k"), [(40, 40), (159, 40), (161, 40), (1000, 7), (5003, 40), (2048, 1)])
def test_top_values_of_blocks_are_those_of_a_sort(vocabulary, k):
    logits = torch.randn(30, vocabulary, generator=generator(4))
    logits[::3] = logits[::3].round()
    logits[1] = logits[1].sort().values  # the highest lie side by side, or
    logits[2, -k:] += 10  # behind the last whole block
    assert torch.equal(top_values(logits, k), logits.sort(-1, descending=True).values[:, :k])


def test_slices_change_nothing(monkeypatch):
    logits = torch.randn(20, 30, generator=generator(5))
    wanted = torch.randint(0, 30, (20,), generator=generator(6))
    expected = [log_probabilities(logits, wanted, d) for d in SCHEMES]
    monkeypatch.setattr(extraction, "VALUES_AT_ONCE", 70)
    for decoding, one in zip(SCHEMES, expected, strict=True):
        assert torch.equal(log_probabilities(logits, wanted, decoding), one)
    assert log_probabilities(logits[:0], wanted[:0], Decoding()).shape == (0,)


def test_low_temperatures_draw_greedily():
    logits = torch.randn(30, 50, generator=generator(7))
    best = logits.argmax(-1)
    for temperature in (1e-3, 1e-300):
        decoding = Decoding(temperature, None)
        assert log_probabilities(logits, best, decoding).exp().min() > 0.99 or temperature == 1e-3
        assert log_probabilities(logits, (best + 1) % 50, decoding).exp().max() < 0.01
    assert torch.equal(log_probabilities(logits, best, Decoding(top_k=1)), torch.zeros(30, dtype=torch.float64))


# -- many tries -----------------------------------------------------------------------------------------

P = [
    Fraction(1),
    Fraction(9, 10),
    Fraction(1, 2),
    Fraction(1, 10),
    Fraction(1, 10**4),
    Fraction(1, 10**20),
    Fraction(0),
]
LOG_P = torch.tensor([math.log(p) if p else -math.inf for p in P], dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_chances_of_many_tries_are_exact_fractions(n):
    expected = [float(1 - (1 - p) ** n) for p in P]
    assert extracted_in(LOG_P, n).tolist() == pytest.approx(expected, rel=1e-13)
    assert expected_share(LOG_P, n) == pytest.approx(sum(expected) / len(P), rel=1e-13)


def test_many_tries_at_once():
    tries = torch.tensor([1.0, 10.0, 1e6])
    found = extracted_in(LOG_P[:, None], tries)
    assert torch.equal(found, torch.stack([extracted_in(LOG_P, n) for n in (1, 10, 1e6)], 1))


@pytest.mark.parametrize("p", [0.1, 0.19, 0.5, 0.75, 0.9, 0.999])
def test_tries_needed_are_counted(p):
    """The first n with 1 - (1 - p_z)^n >= p, in fractions."""
    chance = Fraction(str(p))
    found = tries_needed(LOG_P, p).tolist()
    for p_z, n in zip(P[:5], found, strict=False):
        n = int(n)
        assert 1 - (1 - p_z) ** n >= chance
        assert n == 1 or 1 - (1 - p_z) ** (n - 1) < chance
    assert found[5] == pytest.approx(-math.log1p(-p) * 1e20, rel=1e-12) and found[6] == math.inf


def test_rates_on_a_grid_are_counted():
    tries, chances = [1, 5, 100, 3000], [0.001, 0.1, 0.5, 0.99]
    some = [*P[:5], P[-1]]
    found = extraction_rates(LOG_P[[0, 1, 2, 3, 4, -1]], tries, chances).tolist()
    for n, row in zip(tries, found, strict=True):
        for p, rate in zip(chances, row, strict=True):
            assert rate == sum(1 - (1 - p_z) ** n >= Fraction(str(p)) for p_z in some) / 6


def test_bounds_that_are_met_exactly_are_reached():
    log_p = torch.tensor([0.001, 0.01, 0.1, 0.5], dtype=torch.float64).log()
    for i, p in enumerate((0.001, 0.01, 0.1, 0.5)):
        assert reaches(log_p, p).tolist() == [j >= i for j in range(4)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Decoding(temperature=0), "temperature is 0"),
        (lambda: Decoding(temperature=-1.0), "temperature is -1.0"),
        (lambda: Decoding(temperature=math.nan), "temperature is nan"),
        (lambda: Decoding(temperature=math.inf), "temperature is inf"),
        (lambda: Decoding(top_k=0), "top_k is 0"),
        (lambda: Decoding(top_p=0), "top_p is 0"),
        (lambda: Decoding(top_p=1.5), "top_p is 1.5"),
        (lambda: Decoding(top_p=math.nan), "top_p is nan"),
        (lambda: extracted_in(LOG_P, 0), "tries is 0"),
        (lambda: tries_needed(LOG_P, 1), "probability is 1"),
        (lambda: extraction_rates(LOG_P, [1], [0.0]), "probability is 0.0"),
        (lambda: extraction_rates(LOG_P, [0], [0.5]), "tries is"),
        (lambda: reaches(LOG_P, math.nan), "probability is nan"),
    ],
)
def test_wrong_settings_are_told(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
