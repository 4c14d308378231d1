"""nDCG and top tokens against loops, sorts and torchmetrics."""

import math
import sys
from importlib import import_module

import pytest
import torch
from torchmetrics.retrieval import RetrievalNormalizedDCG

from lightning_kfac.metrics.functional import ndcg, top_tokens
from tests.common import generator

# By name: the package has a function of the same one.
module = import_module("lightning_kfac.metrics.functional.ndcg")


def test_top_tokens_break_ties_by_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0, 3.0, 0.0, -0.0, -2.0]])
    assert top_tokens(logits, 8).tolist() == [[1, 2, 4, 0, 5, 6, 3, 7]]
    many = torch.randint(-3, 4, (30, 200), generator=generator()).float()
    expected = [sorted(range(200), key=lambda v: (-row[v], v))[:10] for row in many.tolist()]
    assert top_tokens(many).tolist() == expected


def test_ndcg_equals_torchmetrics():
    edited, baseline = (torch.randn(40, 50, generator=generator(s)) for s in (1, 2))
    edited = edited + baseline
    found = ndcg(top_tokens(edited), top_tokens(baseline))
    oracle = RetrievalNormalizedDCG(top_k=10)
    for n in range(40):
        relevance = torch.zeros(50, dtype=torch.long)
        relevance[baseline[n].topk(10).indices] = torch.arange(10, 0, -1)
        value = oracle(edited[n].double(), relevance, indexes=torch.zeros(50, dtype=torch.long))
        assert found[n].item() == pytest.approx(value.item(), abs=1e-6)  # theirs is float32


def test_ndcg_is_a_loop_and_exactly_one_against_itself():
    rankings = top_tokens(torch.randn(30, 40, generator=generator()))
    others = top_tokens(torch.randn(30, 40, generator=generator(7)))
    assert (ndcg(rankings, rankings) == 1).all()
    ideal = sum((10 - r) / math.log2(r + 2) for r in range(10))
    for ranking, reference, value in zip(others.tolist(), rankings.tolist(), ndcg(others, rankings), strict=True):
        gained = sum(
            (10 - reference.index(token)) / math.log2(r + 2) for r, token in enumerate(ranking) if token in reference
        )
        assert value.item() == pytest.approx(gained / ideal, rel=1e-14)


def full_sort(row, k):
    """Descending, ties by the lowest id."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:k]


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7, 8, 20, 21, 100])
@pytest.mark.parametrize("positions_at_once", [1, 3, 4])
def test_slices_change_no_rank(tokens_at_once, positions_at_once, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", positions_at_once)
    logits = torch.randint(-3, 4, (4, 20), generator=generator()).float()
    for k in (1, 5, 20):
        assert top_tokens(logits, k).tolist() == [full_sort(row, k) for row in logits.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_top_tokens_keep_the_shape_of_the_positions(dtype):
    logits = torch.randn(2, 3, 5, generator=generator()).to(dtype)
    found = top_tokens(logits, 4)
    assert found.dtype == torch.int64 and found.shape == (2, 3, 4)
    assert found.tolist() == [[full_sort(row, 4) for row in rows] for rows in logits.tolist()]
    assert top_tokens(torch.randn(2, 30)).shape == (2, 10)


def test_float64_logits_are_ranked_in_float32():
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 2.0]], dtype=torch.float64)
    assert top_tokens(logits, 3).tolist() == [[2, 0, 1]]


def test_floats_of_every_kind_are_in_order():
    """Ends of the range, subnormal numbers, infinities, both zeros: and neighbours of some."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    numbers = [-math.inf, -huge, -1.0, -tiny, -tiny / 2, -0.0, 0.0, tiny / 2, tiny, 1.0, 1.0 + 2**-23, huge, math.inf]
    shuffled = [numbers[i] for i in torch.randperm(len(numbers), generator=generator()).tolist()]
    assert top_tokens(torch.tensor([shuffled]), len(numbers)).tolist() == [full_sort(shuffled, len(numbers))]


def test_a_large_vocabulary():
    """Beyond one slice of tokens, with the best in each of them, and ties across."""
    logits = torch.zeros(1, 40_000)
    logits[0, [3, 16_383, 16_384, 39_999]] = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert top_tokens(logits, 6).tolist() == [[39_999, 16_383, 16_384, 3, 0, 1]]


def test_many_positions():
    logits = torch.randn(2, 301, 12, generator=generator())
    found = top_tokens(logits, 3)
    assert torch.equal(found, logits.topk(3).indices)  # no ties among these


@pytest.mark.parametrize("k", [1, 2, 10])
def test_ndcg_of_disjoint_and_of_reversed_rankings(k):
    reference = torch.arange(k)
    assert ndcg(reference + k, reference).item() == 0
    ideal = sum((k - r) / math.log2(r + 2) for r in range(k))
    gained = sum((r + 1) / math.log2(r + 2) for r in range(k))
    found = ndcg(reference.flip(0), reference)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(gained / ideal, rel=1e-14)


def test_ndcg_keeps_the_shape_of_the_positions():
    ranking, reference = (
        torch.stack([torch.randperm(9, generator=generator(s))[:4] for s in range(a, a + 6)]) for a in (0, 10)
    )
    flat = ndcg(ranking, reference)
    assert flat.shape == (6,) and torch.equal(ndcg(ranking.view(2, 3, 4), reference.view(2, 3, 4)), flat.view(2, 3))


def test_the_default_device_plays_no_part():
    logits = torch.randn(3, 20, generator=generator())
    ranking = top_tokens(logits)
    with torch.device("meta"):
        assert torch.equal(top_tokens(logits), ranking)
        assert torch.equal(ndcg(ranking, ranking), torch.ones(3, device="cpu"))


def test_top_tokens_over_parts_of_the_vocabulary(monkeypatch):
    module = sys.modules[top_tokens.__module__]
    logits = torch.randint(-3, 4, (30, 200), generator=torch.Generator().manual_seed(0)).float()
    whole = top_tokens(logits)
    for size in (1, 7, 64, 199):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", size)
        assert torch.equal(top_tokens(logits), whole)
