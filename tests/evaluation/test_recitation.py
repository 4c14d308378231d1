"""Recitation decided by one forward, against decoding token by token with the library's own generate."""

import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation import recitation
from lightning_kfac.evaluation.recitation import gold_hits, recite
from lightning_kfac.evaluation.scoring import most_likely, next_token_scores, position_stress
from lightning_kfac.metrics.functional import cut_after_end, stress_length
from lightning_kfac.models.cached_rows import has_plain_cache
from lightning_kfac.models.probes import takes_own_mask
from lightning_kfac.models.tokens import TokenBatch
from tests.common import VOCAB, build_model, generated, sequences


@pytest.mark.parametrize("end_of_text", [set(), {0}, {3, 5, 7, 11, 20, 33}])
def test_recitation_equals_generate(any_model, end_of_text):
    prefixes, golds = sequences(any_model)
    recitals = recite(any_model, prefixes, golds, end_of_text)
    quick = recite(any_model, prefixes, golds, end_of_text, decode=False)
    for prefix, gold, recital, fast in zip(prefixes, golds, recitals, quick, strict=True):
        gold = list(cut_after_end(gold, end_of_text))
        alone = generated(any_model, prefix, len(gold), end_of_text)
        assert recital.continuation == alone
        assert recital.strict == fast.strict == (alone == gold)
        same = [a == b for a, b in zip(alone, gold, strict=False)]
        matched = same.index(False) if False in same else len(same)
        assert recital.matched == fast.matched == matched
        assert not recital.near_tie and fast.continuation is None


@pytest.mark.parametrize("first", [1, 2, 5, 100])
def test_where_the_reading_is_cut_changes_nothing(monkeypatch, first):
    model = build_model("llama")
    prefixes, golds = sequences(model, seed=1)
    expected = recite(model, prefixes, golds)
    monkeypatch.setattr(recitation, "FIRST", first)
    monkeypatch.setattr(recitation, "POSITIONS_AT_ONCE", 7)
    assert recite(model, prefixes, golds) == expected


def test_sliding_windows_are_decoded_anew():
    """Places left out of account would shift a window; such models take the plain way."""
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "mistral", **settings, num_key_value_heads=2, head_dim=12, sliding_window=6, vocab_size=VOCAB
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    assert not has_plain_cache(model)
    prefixes, golds = sequences(model, seed=2)
    for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
        assert recital.continuation == generated(model, prefix, len(gold))


def test_the_demo_recites_what_it_memorized(demo_model):
    rows = [load_memorized(f"demo:{name}.jsonl", None, 2048)[:12] for name in ("planted_report", "unseen")]
    prefixes, golds = ([getattr(s, part) for some in rows for s in some] for part in ("prefix", "suffix"))
    recitals = recite(demo_model, prefixes, golds, {0})
    for prefix, gold, recital in zip(prefixes, golds, recitals, strict=True):
        assert recital.continuation == generated(demo_model, prefix, len(gold), {0})
    assert [r.strict for r in recitals] == [True] * 12 + [False] * 12


def test_near_ties_are_told():
    """Two tokens with the same weights have equal logits; the lowest id wins, and the verdict is marked."""
    model = build_model("olmo2", dtype=torch.bfloat16)
    prefix = [5, 9, 2]
    (token,) = generated(model, prefix, 1)
    twin = 60 if token != 60 else 59
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[twin] = weight[token]
    low = min(token, twin)
    recitals = recite(model, [prefix] * 3, [[low], [max(token, twin)], [(token + 7) % 50]])
    assert [r.strict for r in recitals] == [True, False, False]
    assert [r.near_tie for r in recitals] == [True, True, False]
    assert [r.continuation for r in recitals] == [[low]] * 3


def test_bfloat16_verdicts_differ_from_generate_only_at_near_ties():
    model = build_model("olmo2", dtype=torch.bfloat16)
    prefixes, golds = sequences(model, count=40, seed=3)
    for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
        assert recital.strict == (generated(model, prefix, len(gold)) == gold) or recital.near_tie


def test_reciting_nothing(any_model):
    assert recite(any_model, [], []) == []


# -- position stress -------------------------------------------------------------------------------------------


def matching(continuation, gold):
    length = 0
    while length < min(len(continuation), len(gold)) and continuation[length] == gold[length]:
        length += 1
    return length


@pytest.mark.parametrize("include_unperturbed", [False, True])
@pytest.mark.parametrize("t", [3, 20])
def test_position_stress_equals_generating_every_prompt(t, include_unperturbed):
    model = build_model("gpt2")
    prefixes, golds = sequences(model, count=9, seed=4)
    found = position_stress(model, prefixes, golds, t, include_unperturbed)
    for prefix, gold, (original, stress) in zip(prefixes, golds, found, strict=True):
        assert original == matching(generated(model, prefix, len(gold)), gold)
        prompts = [(prefix + gold[:e], gold[e:]) for e in range(1, min(t, len(gold)) + 1)]
        prompts += [(prefix[-n:], gold) for n in range(t + 1, len(prefix))]
        prompts += [(prefix, gold)] * include_unperturbed
        lengths = [matching(generated(model, prompt, len(rest)), rest) for prompt, rest in prompts if rest]
        assert stress == max(lengths, default=0)


def test_stress_length_by_hand():
    hits = [True, True, False, True, True, True, False]
    assert stress_length(hits, [], t=20) == 3  # after three extra tokens
    assert stress_length(hits, [], t=2) == 1  # after one: hits[1:] begins with one hit
    assert stress_length(hits, [5], t=2) == 5
    assert stress_length([True] * 4, [], t=20) == 3 and stress_length([True] * 4, [], 20, True) == 4
    assert stress_length([], [], t=20) == 0


def test_gold_hits_of_ragged_rows(any_model):
    prefixes, golds = sequences(any_model, count=6)
    hits = gold_hits(any_model, prefixes, golds)
    for prefix, gold, row in zip(prefixes, golds, hits.tolist(), strict=True):
        logits = any_model(torch.tensor([prefix + gold])).logits[0].argmax(-1).tolist()
        assert row[: len(gold)] == [logits[len(prefix) + i - 1] == token for i, token in enumerate(gold)]
        assert not any(row[len(gold) :])


# -- scores of text -----------------------------------------------------------------------------------------------


def test_sliced_head_gives_the_scores_of_whole_logits(any_model, monkeypatch):
    from lightning_kfac.evaluation import scoring

    ids = torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = TokenBatch.from_dict({"input_ids": ids, "attention_mask": mask})
    monkeypatch.setattr(scoring, "is_plain_head", lambda model: False)
    losses, ranking = next_token_scores(any_model, batch)
    logits = any_model(ids, attention_mask=mask).logits
    expected = torch.log_softmax(logits.double(), -1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(-losses[batch.valid], expected[batch.valid], atol=1e-5)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * VOCAB)
    monkeypatch.setattr(scoring, "is_plain_head", lambda model: True)
    sliced, same = next_token_scores(any_model, batch)
    assert torch.allclose(sliced, losses, atol=1e-5) and torch.equal(same[batch.valid], ranking[batch.valid])
    assert torch.equal(most_likely(any_model, batch), ranking[..., 0])


# -- what a review found --------------------------------------------------------------------------------------------


def test_rows_that_have_ended_do_not_run_out_of_positions():
    """GPT-2 with 32 positions: 32 and 21 tokens fit, although the batch decodes on beyond the end of the first row."""
    model = build_model("gpt2", n_positions=32)
    for prefixes, golds in (([[3] * 30, [4]], [[4] * 2, [5] * 20]), ([[4], [3] * 30], [[5] * 20, [4] * 2])):
        for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
            assert recital.continuation == generated(model, prefix, len(gold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen3", "gpt2"])
def test_models_that_bear_gaps_and_masks_are_known(family, dtype):
    model = build_model(family, dtype=dtype)
    assert has_plain_cache(model) and takes_own_mask(model)


@pytest.mark.parametrize("family", ["mpt", "gpt_neo"])
def test_models_that_count_places_are_decoded_anew(family):
    """ALiBi counts places of the cache, and GPT-Neo's windows lie in the model: gaps would shift both."""
    settings = {
        "mpt": {"d_model": 24, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
        "gpt_neo": {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 64,
            "window_size": 6,
            "attention_types": [[["global", "local"], 1]],
        },
    }[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings, vocab_size=VOCAB, eos_token_id=None, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    assert not has_plain_cache(copy.deepcopy(model).bfloat16()) and not has_plain_cache(model)
    rng = random.Random(0)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(12)] for _ in range(7)]
    golds = [[rng.randrange(1, VOCAB) for _ in range(9)] for _ in prefixes]
    for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
        ids = list(prefix)
        for _ in gold:
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert recital.continuation == ids[len(prefix) :]


def test_wrong_logits_are_no_verdict():
    model = build_model("olmo2")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="logits are not finite"):
        recite(model, [[1, 2]], [[0, 0]])


def test_wrong_model_without_a_cache():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=VOCAB, state_size=4)
    with pytest.raises(InputError, match="MambaForCausalLM has no key-value cache"):
        recite(AutoModelForCausalLM.from_config(config), [[1, 2]], [[3]])


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_a_band_of_context_is_that_many_tokens(family):
    """In a model of one layer a band of n tokens is the same as running each token with n - 1 before it."""
    sizes = {"num_hidden_layers": 1} if family == "olmo2" else {"n_layer": 1}
    model = build_model(family, **sizes)
    assert takes_own_mask(model)
    ids = torch.randint(1, VOCAB, (1, 14), generator=torch.Generator().manual_seed(6))
    found = most_likely(model, TokenBatch.from_dict({"input_ids": ids, "dense": False}), context=5)[0]
    for place in range(14):
        first = max(0, place - 4)
        positions = torch.arange(first, place + 1)[None]
        logits = model(ids[:, first : place + 1], position_ids=positions).logits[0, -1]
        assert found[place] == logits.argmax()
