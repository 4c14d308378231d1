"""nDCG and top tokens against loops, sorts and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalNormalizedDCG

from lightning_kfac.metrics.functional import ndcg, top_tokens
from tests.common import generator


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
