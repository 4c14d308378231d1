"""Curvature factors against plain autograd in float64, and what they must not depend on."""

import copy

import pytest
import torch

from lightning_kfac import InputError, collect_factors
from tests.common import TOLERANCE, assert_same, batched, build_model, projections_of, relative_error
from tests.oracle import one_row_factors, sampled_targets


@pytest.mark.parametrize("labels", ["gold", "sampled"])
def test_factors_equal_plain_autograd(any_model, rows, labels):
    found = collect_factors(any_model, batched(rows, 3), projections=projections_of(any_model), labels=labels, seed=5)
    double = copy.deepcopy(any_model).double()
    targets = [row[1:] for row in rows] if labels == "gold" else sampled_targets(double, rows, seed=5)
    expected = one_row_factors(double, list(found), rows, targets)
    assert len(found) == 3 * len(projections_of(any_model))
    for name, (A, G, n) in expected.items():
        assert found[name].n_tokens == n == sum(len(row) - 1 for row in rows)
        assert found[name].A.dtype == found[name].G.dtype == torch.float32
        assert relative_error(found[name].A, A) < TOLERANCE, name
        assert relative_error(found[name].G, G) < TOLERANCE, name


@pytest.mark.parametrize("labels", ["gold", "sampled"])
@pytest.mark.parametrize(("size", "side"), [(1, "right"), (3, "right"), (3, "left"), (99, "right"), (99, "left")])
def test_batching_and_padding_change_nothing(any_model, rows, labels, size, side):
    settings = {"projections": projections_of(any_model), "labels": labels}
    alone = collect_factors(any_model, [{"input_ids": torch.tensor([row])} for row in rows], **settings)
    assert_same(collect_factors(any_model, batched(rows, size, side), **settings), alone)


def test_attention_projections(rows):
    model = build_model("llama")
    found = collect_factors(model, batched(rows, 3), projections=("q", "k", "v", "o"), labels="gold")
    expected = one_row_factors(copy.deepcopy(model), list(found), rows, [row[1:] for row in rows])
    for name, (A, G, _) in expected.items():
        assert relative_error(found[name].A, A) < TOLERANCE
        assert relative_error(found[name].G, G) < TOLERANCE


def test_model_is_left_as_it_was(rows):
    model = build_model("gpt2").train()
    model.transformer.wte.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    collect_factors(model, batched(rows, 3), projections=["up"])
    assert model.training and all(m.training for m in model.modules())
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0] and p.grad is None
        assert torch.equal(p, before[name][1])
    assert not any(m._forward_hooks for m in model.modules())


def test_dropout_is_off(rows):
    model = build_model("gpt2").train()  # GPT-2 has dropout 0.1
    first = collect_factors(model, batched(rows, 3), projections=["up"], labels="gold")
    assert_same(collect_factors(model, batched(rows, 3), projections=["up"], labels="gold"), first, 1e-12)


def test_bfloat16_model_is_close(rows):
    model = build_model("olmo2")
    exact = collect_factors(model, batched(rows, 3), labels="gold")
    rounded = collect_factors(copy.deepcopy(model).bfloat16(), batched(rows, 3), labels="gold")
    for name, factors in exact.items():  # bfloat16 has 8 bits: the model's own rounding
        assert relative_error(rounded[name].A, factors.A) < 2e-2
        assert relative_error(rounded[name].G, factors.G) < 6e-2


def test_wrong_batch():
    model = build_model("olmo2")
    with pytest.raises(InputError, match="input_ids"):
        collect_factors(model, [{"text": "x"}])
    with pytest.raises(InputError, match=r"attention_mask has shape \[1, 3\]"):
        collect_factors(model, [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}])
    with pytest.raises(InputError, match="sampled or gold"):
        collect_factors(model, [], labels="true")


def test_attention_implementations_agree(rows):
    model = build_model("llama")
    model.set_attn_implementation("sdpa")
    sdpa = collect_factors(model, batched(rows, 3), labels="gold")
    model.set_attn_implementation("eager")
    assert_same(collect_factors(model, batched(rows, 3), labels="gold"), sdpa)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_give_the_same_factors(rows):
    model = build_model("olmo2", num_hidden_layers=2)
    plain = collect_factors(model, batched(rows, 7), labels="gold")
    model.compile(backend="aot_eager")  # tracing and autograd of torch.compile, without a C++ compiler
    assert_same(collect_factors(model, batched(rows, 7), labels="gold"), plain)


def test_passes_do_not_change_the_factors(rows):
    model = build_model("llama")
    batches = batched(rows, 3)
    one = collect_factors(model, batches)
    several = collect_factors(model, batches, layers_per_pass=2)
    assert list(one) == list(several)
    assert_same(several, one, 1e-12)
    with pytest.raises(InputError, match="5 passes are needed: give `batches` as a list"):
        collect_factors(model, iter(batches), layers_per_pass=2)
    assert_same(collect_factors(model, iter(batches)), one, 1e-12)
