"""Near-verbatim lower bounds against every possible outcome, and edit distances against another package."""

import itertools
import math
import random

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional import Decoding, log_near_verbatim
from lightning_kfac.metrics.functional.extraction import likeliest, log_probabilities
from lightning_kfac.metrics.functional.near_verbatim import next_edits

VOCABULARY = 4
END = 0


def table(seed):
    """Logits that depend on the last two tokens alone: what is drawn behind any beginning can be looked up."""
    rows = 2 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda before: rows[before[-2], before[-1]] if len(before) > 1 else rows[0, before[-1]]


def log_of(logits_after, prefix, tokens, decoding):
    """A Python loop over the tokens."""
    text = list(prefix)
    total = 0.0
    for token in tokens:
        total += log_probabilities(logits_after(text)[None], torch.tensor([token]), decoding).item()
        text.append(token)
    return total


def outcomes(length):
    """All continuations of so many tokens, or that end before."""
    every = itertools.product(range(VOCABULARY), repeat=length)
    cut = {tuple(tokens[: tokens.index(END) + 1]) if END in tokens else tokens for tokens in every}
    return sorted(cut)


class Walk:
    """The beams of ``log_near_verbatim`` on a table."""

    def __init__(self, logits_after, prefixes, decoding, count):
        self.after, self.texts, self.decoding, self.count = logits_after, [list(p) for p in prefixes], decoding, count

    def draws(self):
        return likeliest(torch.stack([self.after(text) for text in self.texts]), self.count, self.decoding)

    def step(self, parents, tokens, running):
        assert len(parents) == len(tokens) == len(running)
        self.texts = [[*self.texts[p], t] for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        return self.draws()


@pytest.mark.parametrize("decoding", [Decoding(top_k=None), Decoding(0.8, 3), Decoding(1.3, None, 0.9)], ids=str)
@pytest.mark.parametrize("distance", [1, 2])
def test_bounds_against_all_outcomes(decoding, distance):
    rng = random.Random(distance)
    logits_after = table(distance)
    prefixes = [[rng.randrange(1, VOCABULARY) for _ in range(2)] for _ in range(9)]
    golds = [[rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 5))] for _ in prefixes]
    golds[0] = [1, 2, END]  # ends with the text
    own = torch.tensor(
        [log_of(logits_after, p, g, decoding) for p, g in zip(prefixes, golds, strict=True)], dtype=torch.float64
    )
    exact = []
    for prefix, gold in zip(prefixes, golds, strict=True):
        near = [o for o in outcomes(len(gold)) if Levenshtein.distance(o, gold) <= distance]
        exact.append(math.fsum(math.exp(log_of(logits_after, prefix, o, decoding)) for o in near))
    assert max(exact) <= 1 + 1e-9 and sum(e > math.exp(p) + 1e-6 for e, p in zip(exact, own.tolist(), strict=True)) >= 5
    lower = []
    for width in (1, 2, 5, VOCABULARY**4):
        walk = Walk(logits_after, prefixes, decoding, max(width, VOCABULARY))
        found = log_near_verbatim(walk.draws(), walk.step, golds, own, distance, width, {END})
        assert (found >= own).all() and (found <= 0).all()
        assert all(f <= e + 1e-12 for f, e in zip(found.exp().tolist(), exact, strict=True))
        lower.append(found.exp().tolist())
    assert lower[-1] == pytest.approx(exact, abs=1e-12)  # nothing is left out of so many beams
    assert sum(lower[0]) < sum(exact) - 1e-6  # and something is of one beam


def test_a_suffix_that_is_certain_stays_so():
    certain = torch.zeros(1, 3).masked_fill(torch.tensor([[True, False, True]]), -math.inf)
    draws = likeliest(certain, 3, Decoding(top_k=None))
    own = torch.zeros(1, dtype=torch.float64)
    found = log_near_verbatim(draws, lambda *_: draws, [[1, 1, 1]], own, 1, 4)
    assert found.tolist() == [0.0]


def test_edit_distances():
    rng = random.Random(0)
    for _ in range(50):
        gold = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        text = [rng.randrange(3) for _ in range(rng.randrange(9))]
        edits = torch.arange(len(gold) + 1)
        for token in text:
            edits = next_edits(edits, torch.tensor(token), torch.tensor(gold))
        assert edits.tolist() == [Levenshtein.distance(text, gold[:n]) for n in range(len(gold) + 1)]


@pytest.mark.parametrize(("distance", "width", "said"), [(0, 4, "near_verbatim is 0"), (1, 0, "beams is 0")])
def test_wrong_settings(distance, width, said):
    with pytest.raises(InputError, match=said):
        log_near_verbatim((torch.zeros(1, 1), torch.zeros(1, 1)), None, [[1]], torch.zeros(1), distance, width)
