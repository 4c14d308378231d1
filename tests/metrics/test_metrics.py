"""Metrics that accumulate, against straightforward loops, and decoding against the library's own."""

import math

import numpy as np
import pytest
import torch

from lightning_kfac.data.loaders import TokenRows, row_loader
from lightning_kfac.data.packing import row_offsets
from lightning_kfac.evaluation.decoding import greedy_continuations
from lightning_kfac.metrics import NDCG, Memorization, Perplexity
from lightning_kfac.metrics.functional import ndcg, top_tokens
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.tokens import TokenBatch
from tests.common import VOCAB, build_model, generator

# -- memorization -------------------------------------------------------------------------------------


def test_memorization_averages_over_sequences():
    golds = [[1, 2, 3, 4], [1, 2], [7] * 8]
    continuations = [[1, 2, 3, 4], [3, 4], [7] * 7 + [1]]
    metric = Memorization()
    metric.update(continuations[:1], golds[:1])
    metric.update(continuations[1:], golds[1:])
    result = {k: v.item() for k, v in metric.compute().items()}
    assert result == {
        "strict_acc": 1 / 3,
        "loose_acc": 2 / 3,
        "avg_levenshtein_norm": pytest.approx((0 + 1 + 1 / 8) / 3, abs=1e-15),
        "n_sequences": 3,
        "n_near_ties": 0,
    }


# -- decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo2", "llama", "gpt2"])
def test_greedy_continuations_equal_generate(family):
    model = build_model(family)
    prefixes = [torch.randint(1, VOCAB, (n,), generator=generator(n)).tolist() for n in (9, 3, 6, 1, 9)]
    lengths = [7, 12, 1, 5, 9]
    found = greedy_continuations(model, prefixes, lengths)
    for prefix, length, ids in zip(prefixes, lengths, found, strict=True):
        alone = model.generate(
            torch.tensor([prefix]),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ids == alone[0, len(prefix) :].tolist()


def test_decoding_stops_at_end_of_text():
    model = build_model("olmo2")
    prefixes = [[5, 9, 2], [7, 7]]
    free = greedy_continuations(model, prefixes, [12, 12])
    stop = free[0][3]
    stopped = greedy_continuations(model, prefixes, [12, 12], end_of_text={stop})
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    other = free[1].index(stop) + 1 if stop in free[1] else 12
    assert stopped[1] == free[1][:other]


def test_decoding_nothing():
    model = build_model("olmo2")
    assert greedy_continuations(model, [], []) == []
    assert greedy_continuations(model, [[1, 2]], [0]) == [[]]


# -- perplexity ---------------------------------------------------------------------------------------


def test_perplexity_is_a_loop_and_ignores_batching():
    logits = torch.randn(5, 6, 11, generator=generator(), dtype=torch.float64)
    targets = torch.randint(0, 11, (5, 6), generator=generator(1))
    valid = torch.rand(5, 6, generator=generator(2)) > 0.3
    nll, count = 0.0, 0
    for b in range(5):
        for t in range(6):
            if valid[b, t]:
                row = logits[b, t].tolist()
                nll -= row[targets[b, t]] - math.log(sum(map(math.exp, row)))
                count += 1
    for size in (1, 2, 5):
        metric = Perplexity()
        for start in range(0, 5, size):
            part = slice(start, start + size)
            metric.update(logits[part], targets[part], valid[part])
        assert metric.compute().item() == pytest.approx(math.exp(nll / count), rel=1e-12)


# -- nDCG ---------------------------------------------------------------------------------------------


def test_ndcg_metric_averages_over_valid_positions():
    a, b = (top_tokens(torch.randn(2, 5, 30, generator=generator(s))) for s in (1, 2))
    valid = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    metric = NDCG()
    metric.update(a, b, valid)
    assert metric.compute().item() == pytest.approx(ndcg(a, b)[valid].mean().item(), rel=1e-14)


# -- documents in packed rows ---------------------------------------------------------------------------


ENDS = np.array([5, 6, 30, 31, 47, 80, 83])  # of documents, in rows of 16 tokens: some go over several rows


@pytest.mark.parametrize("metric", [LossPerplexity, NDCG])
@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (2, 1), (6, 1), (2, 2)])
def test_figures_are_sums_over_documents(metric, batch_size, world):
    """Against a loop over targets; in any batches and on any number of ranks, to the last bit."""
    rows = TokenRows(np.arange(1, 84, dtype=np.int32), row_offsets(83, 16), (), ENDS)
    values = torch.rand(6, 15, generator=generator(0), dtype=torch.float64)
    rankings = torch.rand(6, 15, 12, generator=generator(1)).argsort(-1)[..., :10]
    others = torch.rand(6, 15, 12, generator=generator(2)).argsort(-1)[..., :10]
    found = metric()
    for rank in range(world):
        for batch in row_loader(rows, batch_size, rank, world):
            tokens = TokenBatch.from_dict(batch)
            index, width = tokens.sample_index, tokens.shape[1]
            documents = rows.documents_of_targets(index, width)
            wide = [torch.cat([x, x[:, :1]], 1)[index, :width] for x in (values, rankings, others)]
            seen = wide[:1] if metric is LossPerplexity else wide[1:]
            found.update(*seen, tokens.valid, index, documents)
    figure = found.compute()
    expected = {}
    every = values if metric is LossPerplexity else ndcg(rankings, others)
    for row in range(6):
        for place in range(15):
            target = 16 * row + place + 1
            if target < 83:
                document = int((target >= ENDS).sum())
                total, count = expected.get(document, (0.0, 0))
                expected[document] = total + every[row, place].item(), count + 1
    assert found.numbers.tolist() == sorted(expected) == [0, 1, 2, 3, 4, 5, 6]
    (behind,) = found.figures.values()
    sums, counts = zip(*(expected[number] for number in sorted(expected)), strict=True)
    assert behind.sums.tolist() == pytest.approx(sums, rel=1e-12) and behind.weights.tolist() == list(counts)
    ratio = sum(sums) / sum(counts)
    assert figure.item() == pytest.approx(math.exp(ratio) if metric is LossPerplexity else ratio, rel=1e-12)
    assert behind.sums.tolist() == SUMS.setdefault(metric, behind.sums.tolist())


SUMS = {}
