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
from lightning_kfac.metrics.functional import cut_after_end
from lightning_kfac.models.cached_rows import has_plain_cache
from tests.common import VOCAB, build_model, generated, sequences


@pytest.fixture(scope="module")
def own(any_model):
    """Sequences of a model, see :func:`sequences`."""
    return sequences(any_model)


@pytest.mark.parametrize("end_of_text", [set(), {0}, {3, 5, 7, 11, 20, 33}])
def test_recitation_equals_generate(any_model, own, end_of_text):
    prefixes, golds = own
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


def test_gold_hits_of_ragged_rows(any_model):
    prefixes, golds = sequences(any_model, count=6)
    hits = gold_hits(any_model, prefixes, golds)
    for prefix, gold, row in zip(prefixes, golds, hits.tolist(), strict=True):
        logits = any_model(torch.tensor([prefix + gold])).logits[0].argmax(-1).tolist()
        assert row[: len(gold)] == [logits[len(prefix) + i - 1] == token for i, token in enumerate(gold)]
        assert not any(row[len(gold) :])


def test_rows_that_have_ended_do_not_run_out_of_positions():
    """GPT-2 with 32 positions: 32 and 21 tokens fit, although the batch decodes on beyond the end of the first row."""
    model = build_model("gpt2", n_positions=32)
    for prefixes, golds in (([[3] * 30, [4]], [[4] * 2, [5] * 20]), ([[4], [3] * 30], [[5] * 20, [4] * 2])):
        for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
            assert recital.continuation == generated(model, prefix, len(gold))


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


def test_a_model_without_a_key_value_cache_recites_what_it_generates(capsys):
    """Its rows are read anew for each token. (Before, recitation of such models was refused.)"""
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=VOCAB, state_size=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prefixes, golds = sequences(model, count=6)
    for prefix, gold, recital in zip(prefixes, golds, recite(model, prefixes, golds), strict=True):
        assert recital.continuation == generated(model, prefix, len(gold))
    assert capsys.readouterr().err.count("every token of a continuation reads its row anew") == 1
