"""Recitation decided by one forward, against decoding token by token with the library's own generate."""

import copy
import itertools
import math
import random
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation import recitation
from lightning_kfac.evaluation.recitation import Recitation, gold_hits, recite
from lightning_kfac.metrics.functional import Decoding, cut_after_end
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


@pytest.mark.parametrize("cuts", [(), (0,), (1,), (2, 5), (100,)])
def test_where_the_reading_is_cut_changes_nothing(monkeypatch, cuts):
    model = build_model("llama")
    prefixes, golds = sequences(model, seed=1)
    expected = recite(model, prefixes, golds)
    monkeypatch.setattr(recitation, "CUTS", cuts)
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


def no_plain_cache(family):
    """Sliding windows, or no key-value cache."""
    settings = {
        "mistral": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6,
        },
        "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    }[family]  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, vocab_size=VOCAB)).eval()


@pytest.mark.parametrize("family", ["olmo2", "gpt2", "mistral", "mamba"])
@pytest.mark.parametrize("sizes", [(3, 0, 9, 1, 4, 6), (23,)])
def test_batches_are_given_back_in_order_and_are_what_generate_gives(family, sizes):
    """Whatever waits for whom: each continuation is that of its prefix alone."""
    model = build_model(family) if family in ("olmo2", "gpt2") else no_plain_cache(family)
    prefixes, golds = sequences(model, 23, seed=5)
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    recitation = Recitation(model, {3, 5})
    done = [recitation.add(prefixes[part], golds[part]) for part in parts]
    batches = [*itertools.chain(*done), *recitation.finish()]
    assert recitation.finish() == [] and list(map(len, batches)) == list(sizes)
    assert len(sizes) == 1 or not done[0]
    for prefix, gold, recital in zip(prefixes, golds, itertools.chain(*batches), strict=True):
        gold = list(cut_after_end(gold, {3, 5}))
        assert recital.continuation == generated(model, prefix, len(gold), {3, 5})
        assert recital.strict == (recital.continuation == gold)


def test_what_diverges_is_decoded_in_full_batches(monkeypatch):
    """Six batches of five, of which one diverges each, are decoded in two groups, not in six."""
    model = build_model("llama")
    prefixes = [[5, 1 + i, 9] for i in range(30)]
    golds = [generated(model, prefix, 12) for prefix in prefixes]
    for number in range(0, 30, 5):
        golds[number][0] = (golds[number][0] + 1) % VOCAB
    groups = []
    monkeypatch.setattr(
        recitation, "continue_greedily",
        lambda rows, first, *rest, original=recitation.continue_greedily: (
            groups.append(len(first)), original(rows, first, *rest)
        )[1],
    )  # fmt: skip
    recited = Recitation(model)
    done = [recited.add(prefixes[i : i + 5], golds[i : i + 5]) for i in range(0, 30, 5)]
    assert list(map(len, done)) == [0, 0, 0, 0, 5, 0] and len(recited.finish()) == 1
    assert groups == [5, 1]


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


# -- how likely a suffix is drawn -----------------------------------------------------------------------

SCHEMES = [Decoding(), Decoding(0.7, 8, 0.9), Decoding(1.5, None, 0.8), Decoding(top_k=None)]


def drawn(model, prefix, gold, decoding):
    """log p of one gold: the model reads it token by token from the beginning, through transformers' own processors."""
    total = torch.zeros((), dtype=torch.float64)
    ids = list(prefix)
    for token in gold:
        scores = model(torch.tensor([ids]), use_cache=False).logits[:, -1].double()
        scores = TemperatureLogitsWarper(decoding.temperature)(None, scores)
        if decoding.top_k is not None:
            scores = TopKLogitsWarper(decoding.top_k)(None, scores)
        if decoding.top_p < 1:
            scores = TopPLogitsWarper(decoding.top_p)(None, scores)
        total += scores.log_softmax(-1)[0, token]
        ids.append(token)
    return total.item()


def mixed(model, decoding, count=17, seed=0):
    """Sequences of :func:`sequences`, half of the golds drawn by ``generate`` instead."""
    prefixes, golds = sequences(model, count, seed)
    torch.manual_seed(seed)
    for number in range(0, count, 2):
        prompt = torch.tensor([prefixes[number]])
        settings = asdict(decoding) | {"top_k": decoding.top_k or 0, "do_sample": True, "max_new_tokens": 12}
        out = model.generate(prompt, eos_token_id=None, pad_token_id=0, **settings)
        golds[number] = out[0, prompt.shape[1] :].tolist()
    return prefixes, golds


@pytest.mark.parametrize("decoding", SCHEMES, ids=str)
@torch.no_grad()
def test_probabilities_are_those_of_reading_token_by_token(any_model, decoding):
    prefixes, golds = mixed(any_model, decoding)
    plain = recite(any_model, prefixes, golds, {0})
    recitals = recite(any_model, prefixes, golds, {0}, decoding=decoding)
    expected = [drawn(any_model, p, cut_after_end(g, {0}), decoding) for p, g in zip(prefixes, golds, strict=True)]
    found = [recital.log_p for recital in recitals]
    assert found == pytest.approx(expected, abs=1e-4)  # float32 arithmetic of the model, over 19 tokens
    assert [recital._replace(log_p=None) for recital in recitals] == plain
    assert sum(map(math.isfinite, found)) >= 5
    assert [r.log_p for r in recite(any_model, prefixes, golds, {0}, decode=False, decoding=decoding)] == found


@pytest.mark.parametrize("decoding", [SCHEMES[1], SCHEMES[3]], ids=str)
@torch.no_grad()
def test_probabilities_do_not_depend_on_the_batch(monkeypatch, decoding):
    model = build_model("llama", torch.float64)
    prefixes, golds = mixed(model, decoding, 23, seed=4)
    expected = [recite(model, [p], [g], decoding=decoding)[0].log_p for p, g in zip(prefixes, golds, strict=True)]
    for size, cuts, at_once in ((23, (0, 8), 1024), (5, (2,), 1024), (23, (), 7), (3, (0, 1, 4), 30)):
        monkeypatch.setattr(recitation, "CUTS", cuts)
        monkeypatch.setattr(recitation, "POSITIONS_AT_ONCE", at_once)
        found = []
        for i in range(0, 23, size):
            part = slice(i, i + size)
            found += [r.log_p for r in recite(model, prefixes[part], golds[part], decode=size == 5, decoding=decoding)]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("end_of_text", [set(), {3, 5, 7, 11, 20, 33}])
def test_with_one_token_to_draw_extraction_is_recitation(any_model, own, end_of_text):
    recitals = recite(any_model, *own, end_of_text, decoding=Decoding(top_k=1))
    strict = [recital.strict for recital in recitals]
    assert [recital.log_p for recital in recitals] == [0.0 if s else -math.inf for s in strict]
    assert 3 < sum(strict) < len(strict)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0.8, 3), Decoding(2.0, None, 0.7)], ids=str)
def test_all_suffixes_of_a_tiny_vocabulary_are_certain_together(decoding):
    model = build_model("olmo2", vocab_size=5)
    suffixes = [list(s) for s in itertools.product(range(5), repeat=3)]
    recitals = recite(model, [[1, 4, 2]] * 125, suffixes, decode=False, decoding=decoding)
    assert math.fsum(math.exp(r.log_p) for r in recitals) == pytest.approx(1, abs=1e-9)
    # Those that end: every text of at most three tokens whose only end of text is its last token.
    ended = {tuple(cut_after_end(s, {0})) for s in suffixes}
    recitals = recite(model, [[1, 4, 2]] * len(ended), [list(s) for s in ended], {0}, decode=False, decoding=decoding)
    assert math.fsum(math.exp(r.log_p) for r in recitals) == pytest.approx(1, abs=1e-9)


def binomial_interval(n, p, level):
    """The narrowest whole numbers below and above which a binomial count lies with (1 - level) / 2 each, exactly."""
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    chances = [math.exp(c + k * math.log(p) + (n - k) * math.log1p(-p)) for k, c in enumerate(logs)]
    below = list(itertools.accumulate(chances))
    tail = (1 - level) / 2
    return next(k for k in range(n + 1) if below[k] >= tail), next(k for k in range(n + 1) if below[k] >= 1 - tail)


def test_what_is_drawn_20000_times_is_as_frequent_as_told():
    """Real samples of ``generate``: each frequency lies in the exact binomial interval (99.9 %)."""
    model = build_model("olmo2", vocab_size=9)
    prefix, length, count, decoding = [4, 7, 1], 3, 20_000, Decoding(0.9, 4, 0.95)
    torch.manual_seed(0)
    settings = asdict(decoding) | {"do_sample": True, "max_new_tokens": length}
    counts = Counter()
    for _ in range(count // 2000):
        out = model.generate(torch.tensor([prefix] * 2000), eos_token_id=0, pad_token_id=0, **settings)
        counts.update(tuple(cut_after_end(row, {0})) for row in out[:, len(prefix) :].tolist())
    suffixes = sorted({tuple(cut_after_end(s, {0})) for s in itertools.product(range(9), repeat=length)})
    recitals = recite(model, [prefix] * len(suffixes), [list(s) for s in suffixes], {0}, False, decoding)
    likely = [(s, math.exp(r.log_p)) for s, r in zip(suffixes, recitals, strict=True)]
    assert set(counts) <= {s for s, p in likely if p > 0}
    some = [(s, p) for s, p in likely if 0.01 <= p <= 0.9]
    assert len(some) >= 5
    for suffix, p in some:
        low, high = binomial_interval(count, p, 0.999)
        assert low <= counts[suffix] <= high, (suffix, p, counts[suffix])


@pytest.mark.parametrize("family", ["mistral", "mpt", "mamba"])
@torch.no_grad()
def test_models_without_a_plain_cache_tell_the_same(family):
    """Sliding windows, distances counted in places, no key-value cache: rows are read whole, or each by itself."""
    settings = {
        "mistral": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6,
        },
        "mpt": {"d_model": 24, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
        "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings, vocab_size=VOCAB, eos_token_id=None, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    assert not has_plain_cache(model)
    rng = random.Random(0)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(2, 12))] for _ in range(7)]
    golds = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 12))] for _ in prefixes]
    decoding = Decoding(1.3, 55)
    expected = [drawn(model, *pair, decoding) for pair in zip(prefixes, golds, strict=True)]
    found = [recital.log_p for recital in recite(model, prefixes, golds, decoding=decoding)]
    assert found == pytest.approx(expected, abs=1e-4) and sum(map(math.isfinite, found)) >= 3


def test_nothing_is_read_of_what_cannot_be_drawn_any_more(monkeypatch):
    """Beyond a cut only rows go on that can still be drawn; without a decoding scheme only what is recited."""
    model = build_model("llama")
    prefixes, _ = sequences(model, 6)
    golds = [generated(model, prefix, 14) for prefix in prefixes]
    least = model(torch.tensor([prefixes[0]])).logits[0, -1].argmin().item()
    golds[0][0] = least
    golds[1][2] = model(torch.tensor([prefixes[1] + golds[1][:2]])).logits[0, -1].topk(2).indices[1].item()
    read = []
    monkeypatch.setattr(
        recitation._Reading, "_read",
        lambda self, rows, numbers, *span, original=recitation._Reading._read: (
            read.append(numbers.tolist()), original(self, rows, numbers, *span)
        ),
    )  # fmt: skip
    recite(model, prefixes, golds, decode=False)
    recitals = recite(model, prefixes, golds, decode=False, decoding=Decoding(top_k=60))
    everyone = [0, 1, 2, 3, 4, 5]
    assert read == [everyone, everyone[1:], everyone[2:], everyone, everyone[1:], everyone[1:]]
    assert recitals[0].log_p == -math.inf and recitals[1].log_p > -math.inf
