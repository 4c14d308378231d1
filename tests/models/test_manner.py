"""What a model's trial says of how it is to be fed."""

import copy
import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from lightning_kfac import collect_factors
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.functions import memorization_score, perplexity
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.models.cached_rows import has_cache, has_plain_cache
from lightning_kfac.models.manner import Manner, manner_of
from lightning_kfac.models.tokens import TokenBatch
from tests.common import assert_same, build_model, padded
from tests.families import TWO_WAY, build_family


def as_class(kind, model):
    """The same model, with another class's forward."""
    changed = copy.deepcopy(model)
    changed.__class__ = kind
    return changed


class Coupled(GPT2LMHeadModel):
    """Its rows see each other, as in a mixture of experts whose experts take so many tokens of a batch."""

    def forward(self, input_ids, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits + (len(input_ids) - 1) * output.logits.flip(-1)
        return output


class Noisy(GPT2LMHeadModel):
    """Its dropout is on in eval mode too."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = torch.nn.functional.dropout(output.logits, 0.1)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.15, None])
@pytest.mark.parametrize("family", TWO_WAY)
def test_models_that_see_what_comes_after_are_refused(family, std, dtype):
    model = build_family(family, std).to(dtype)
    name = type(model).__name__
    for measure in (
        lambda: collect_factors(model, [{"input_ids": torch.arange(3, 15)[None]}], modules=[".*"]),
        lambda: memorization_score(model, None, [[5, 6, 7]], [[8, 9]]),
        lambda: perplexity(model, None, [[5, 6, 7, 8]]),
    ):
        with pytest.raises(InputError, match=f"^{name} is no causal language model"):
            measure()


def test_a_model_that_reads_otherwise_each_time_is_refused():
    with pytest.raises(InputError, match="Noisy reads the same tokens otherwise each time"):
        manner_of(as_class(Noisy, build_model("gpt2")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_leaves_the_model_alone(dtype):
    model = build_model("llama", dtype=dtype).train()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    numbers = torch.get_rng_state()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert manner_of(model) == Manner() and has_plain_cache(model)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), numbers)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    assert all(p.grad is None and p.dtype == dtype for p in model.parameters())


def test_the_trial_is_made_once(monkeypatch):
    model = build_model("gpt2")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    manner_of(model), has_plain_cache(model)
    made = len(calls)
    manner_of(model), has_plain_cache(model)
    assert 0 < made == len(calls) <= 12


def test_rows_that_change_each_other_are_read_one_at_a_time(rows, capsys):
    plain = build_model("gpt2")
    model = as_class(Coupled, plain)
    assert manner_of(model) == Manner(apart_from=0)
    assert "one at a time" in capsys.readouterr().err
    rows = [row for row in rows if len(row) > 1]
    alone = collect_factors(
        plain, [{"input_ids": torch.tensor([row])} for row in rows], labels="gold", projections=["up"]
    )
    for side in ("left", "right"):
        found = collect_factors(model, [padded(rows, side)], labels="gold", projections=["up"])
        assert_same(found, alone)
    assert perplexity(model, None, rows, batch_size=3) == pytest.approx(perplexity(plain, None, rows, batch_size=1))
    prefixes, golds = [row[:2] for row in rows], [row[2:] or [1] for row in rows]
    assert recite(model, prefixes, golds) == recite(plain, prefixes, golds)


def test_damaged_weights_are_not_taken_for_a_manner():
    model = build_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.nan)
    assert manner_of(model) == Manner()


def test_a_model_that_cannot_read_tokens_is_one_line():
    model = build_model("llama")
    model.model.rotary_emb = None
    with pytest.raises(InputError, match="LlamaForCausalLM cannot read rows of tokens: 'NoneType'"):
        manner_of(model)


def test_where_a_context_changes_nothing_the_cache_is_not_trusted():
    model = build_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert not has_plain_cache(model) and not has_cache(model)
    assert [r.strict for r in recite(model, [[5, 6], [7]], [[8, 9], [3]])] == [False, False]


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 3, "long_factor": [4.0] * 3}


def test_rows_longer_than_the_original_context_are_read_apart():
    """Of a batch whose longest row is longer, longrope computes all rows with the long factors."""
    rope = {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}}
    model = build_model("llama", **rope, original_max_position_embeddings=16, max_position_embeddings=64)
    assert manner_of(model) == Manner(apart_from=17)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 61, (n,), generator=generator).tolist() for n in (30, 9, 12, 20)]
    alone = collect_factors(model, [{"input_ids": torch.tensor([row])} for row in rows], labels="gold")
    for side in ("left", "right"):
        assert_same(collect_factors(model, [padded(rows, side)], labels="gold"), alone)
    one = perplexity(model, None, rows, batch_size=1)
    assert perplexity(model, None, rows, batch_size=4) == pytest.approx(one, rel=1e-6)
    prefixes, golds = [row[:8] for row in rows], [row[8:] for row in rows]
    apart = [recite(model, [prefix], [gold])[0] for prefix, gold in zip(prefixes, golds, strict=True)]
    assert recite(model, prefixes, golds) == apart


def test_rows_whose_reading_depends_on_earlier_rows_are_refused():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = build_model("llama", rope_parameters=rope, max_position_embeddings=16)
    batch = TokenBatch.from_dict({"input_ids": torch.ones(1, 16, dtype=torch.long), "dense": False})
    assert batch.logits(model).shape == (1, 16, 61)
    with pytest.raises(InputError, match=r"a row of 17 tokens, but LlamaForCausalLM takes at most 16: .*dynamic RoPE"):
        collect_factors(model, [{"input_ids": torch.ones(1, 18, dtype=torch.long)}])


def test_positions_behind_the_padding_id_are_fewer():
    model = build_family("roberta")
    assert model.config.max_position_embeddings == 96
    assert perplexity(model, None, [[5] * 94]) > 1
    with pytest.raises(InputError, match="a row of 95 tokens, but RobertaForCausalLM takes at most 94: its positions"):
        perplexity(model, None, [[5] * 95])
    with pytest.raises(InputError, match="a row of 95 tokens"):
        recite(model, [[5] * 90], [[6] * 5])
