"""Scores of text, position stress and losses of rows, against one forward or one decoding at a time."""

from functools import cache

import pytest
import torch

from lightning_kfac.evaluation.scoring import next_token_scores, position_stress, target_losses
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.tokens import TokenBatch
from tests.common import VOCAB, batched, build_model, generated, sequences


def matching(continuation, gold):
    length = 0
    while length < min(len(continuation), len(gold)) and continuation[length] == gold[length]:
        length += 1
    return length


@pytest.fixture(scope="module")
def stressed():
    """A model, prefixes and golds, and the length that a prompt's continuation matches, decoded once a prompt."""
    model = build_model("gpt2")

    @cache
    def matched(prompt, gold):
        return matching(generated(model, prompt, len(gold)), gold)

    return model, *sequences(model, count=9, seed=4), lambda prompt, gold: matched(tuple(prompt), tuple(gold))


@pytest.mark.parametrize("include_unperturbed", [False, True])
@pytest.mark.parametrize("t", [3, 20])
def test_position_stress_equals_generating_every_prompt(stressed, t, include_unperturbed):
    model, prefixes, golds, matched = stressed
    found = position_stress(model, prefixes, golds, t, include_unperturbed)
    for prefix, gold, (original, stress) in zip(prefixes, golds, found, strict=True):
        assert original == matched(prefix, gold)
        prompts = [(prefix + gold[:e], gold[e:]) for e in range(1, min(t, len(gold)) + 1)]
        prompts += [(prefix[-n:], gold) for n in range(t + 1, len(prefix))]
        prompts += [(prefix, gold)] * include_unperturbed
        lengths = [matched(prompt, rest) for prompt, rest in prompts if rest]
        assert stress == max(lengths, default=0)


def test_sliced_head_gives_the_scores_of_whole_logits(any_model, monkeypatch):
    from lightning_kfac.models import logits as sliced

    ids = torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = TokenBatch.from_dict({"input_ids": ids, "attention_mask": mask})
    monkeypatch.setattr(sliced, "is_plain_head", lambda model: False)
    losses, ranking = next_token_scores(any_model, batch)
    logits = any_model(ids, attention_mask=mask).logits
    expected = torch.log_softmax(logits.double(), -1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(-losses[batch.valid], expected[batch.valid], atol=1e-5)
    monkeypatch.setattr(sliced, "LOGITS_AT_ONCE", 5 * VOCAB)
    monkeypatch.setattr(sliced, "is_plain_head", lambda model: True)
    sliced, same = next_token_scores(any_model, batch)
    assert torch.allclose(sliced, losses, atol=1e-5) and torch.equal(same[batch.valid], ranking[batch.valid])


def test_target_losses_against_one_row_at_a_time(rows):
    model = build_model("llama")
    batches = [TokenBatch.from_dict(batch, 4 * number) for number, batch in enumerate(batched(rows, 4, "left"))]
    found = [loss for batch in batches for loss in target_losses(model, batch).sum(1).tolist()]
    for number, row in enumerate(rows):
        with torch.no_grad():
            shares = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        expected = -sum(shares[t, row[t + 1]].item() for t in range(len(row) - 1))
        assert found[number] == pytest.approx(expected, rel=1e-5)


def test_rows_without_targets_are_left_out():
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([[1, 2, 3], [-100] * 3])}
    tokens = TokenBatch.from_dict(batch)
    losses = target_losses(build_model("llama"), tokens)
    assert losses[0].count_nonzero() == 2 and not losses[1].any()
    for documents in (None, torch.tensor([[0, 1, 1], [2, 2, 2]])):
        metric = LossPerplexity()
        metric.update(losses, tokens.valid, tokens.sample_index, documents)
        metric.compute()
        assert metric.numbers.tolist() == ([0] if documents is None else [0, 1])
