"""Beams that a model reads, against every outcome read by itself."""

import itertools
import math

import pytest
from rapidfuzz.distance import Levenshtein

from lightning_kfac.evaluation.near_verbatim import near_verbatim
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.metrics.functional import Decoding, cut_after_end
from tests.common import build_model

V = 6


@pytest.mark.parametrize("family", ["olmo2", "gpt2", "mistral"])
def test_wide_beams_find_all_that_is_near(family):
    sliding = family == "mistral"  # rows of a sliding window's cache cannot be taken by themselves
    model = build_model("llama" if sliding else family, vocab_size=V) if not sliding else _mistral()
    prefixes, golds = [[1, 4, 2, 2, 5], [3], [2, 2]], [[1, 5], [4, 2, 3], [3, 0, 2]]
    decoding, distance = Decoding(0.9, 5), 1
    read = recite(model, prefixes, golds, {0}, decode=False, decoding=decoding)
    own = [recital.log_p for recital in read]
    exact = []
    for prefix, gold in zip(prefixes, golds, strict=True):
        gold = list(cut_after_end(gold, {0}))
        every = {tuple(cut_after_end(o, {0})) for o in itertools.product(range(V), repeat=len(gold))}
        near = [list(o) for o in every if Levenshtein.distance(o, gold) <= distance]
        alone = [recite(model, [prefix], [o], {0}, decode=False, decoding=decoding)[0].log_p for o in near]
        exact.append(math.fsum(map(math.exp, alone)))
    wide = near_verbatim(model, prefixes, golds, own, decoding, distance, V**3, {0})
    assert [math.exp(x) for x in wide] == pytest.approx(exact, rel=1e-5)
    narrow = near_verbatim(model, prefixes, golds, own, decoding, distance, 2, {0})
    assert all(o <= n <= w + 1e-6 for o, n, w in zip(own, narrow, wide, strict=True))
    alone = [
        near_verbatim(model, [p], [g], [o], decoding, distance, 2, {0})[0]
        for p, g, o in zip(prefixes, golds, own, strict=True)
    ]
    assert alone == pytest.approx(narrow, abs=1e-5)


def test_a_long_prefix_beside_a_long_suffix_fits_where_each_does():
    model = build_model("olmo2", vocab_size=V, max_position_embeddings=16)
    found = near_verbatim(model, [[1] * 13, [2]], [[3, 4], [5] * 14], [-9.0, -9.0], Decoding(), 2, 3)
    assert all(-9 <= f <= 0 for f in found)


def _mistral():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, sliding_window=4, vocab_size=V, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
