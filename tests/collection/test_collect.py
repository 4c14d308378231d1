"""Curvature factors against plain autograd in float64, and what they must not depend on."""

import copy

import pytest
import torch

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.models.targets import resolve_targets
from tests.common import TOLERANCE, assert_same, batched, build_model, padded, projections_of, relative_error
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


def test_labels_of_minus_100_are_left_out(rows):
    model = build_model("olmo2")
    row = torch.tensor([rows[0]])
    labels = row.clone()
    labels[0, 3:7] = -100
    found = collect_factors(model, [{"input_ids": row, "labels": labels}], labels="gold")
    kept = [t for t in range(11) if not 3 <= t + 1 < 7]
    name = "model.layers.1.mlp.up_proj"
    seen = {}
    double = copy.deepcopy(model).double()
    layer = dict(double.named_modules())[name]
    handle = layer.register_forward_hook(lambda m, a, o: (o.retain_grad(), seen.update(a=a[0][0].detach(), o=o))[0])
    logits = double(input_ids=row).logits[0].log_softmax(-1)
    (-sum(logits[t, row[0, t + 1]] for t in kept)).backward()
    handle.remove()
    G = sum(torch.outer(seen["o"].grad[0, t], seen["o"].grad[0, t]) for t in kept) / len(kept)
    assert found[name].n_tokens == len(kept)
    # Earlier positions 2..5 have a gradient through attention; it is dropped on purpose.
    assert seen["o"].grad[0, 3].norm() > 0
    assert relative_error(found[name].G, G) < TOLERANCE


def test_shared_inputs_are_accumulated_once(rows):
    model = build_model("llama")
    layers = resolve_targets(model, projections=("gate", "up", "down", "q", "k", "v", "o"))
    with CurvatureCapture(layers) as capture:
        model.requires_grad_(False)
        batch = padded(rows[:2])
        capture.begin(batch["attention_mask"].bool())
        model(**batch).logits.sum().backward()
    holders = {name.rpartition(".")[2] for name, sums in capture.sums.items() if sums.A is not None}
    assert holders == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    factors = capture.results()
    assert factors["model.layers.0.mlp.gate_proj"].A is factors["model.layers.0.mlp.up_proj"].A


def test_nothing_below_the_lowest_target_is_differentiated(rows):
    model = build_model("olmo2").requires_grad_(False)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, o, i=i: outputs.update({i: o if torch.is_tensor(o) else o[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    with CurvatureCapture(resolve_targets(model, [1], ["up"])) as capture:
        batch = padded(rows[:2])
        capture.begin(batch["attention_mask"].bool())
        loss = model(**batch).logits.sum()
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert [outputs[i].requires_grad for i in range(3)] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert capture.root.grad is None


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


def test_seed_and_labels_matter(rows):
    model = build_model("olmo2")
    name = "model.layers.2.mlp.up_proj"

    def G(**settings):
        return collect_factors(model, batched(rows, 3), blocks=[2], projections=["up"], **settings)[name].G

    assert relative_error(G(seed=1), G(seed=0)) > 1e-2
    assert relative_error(G(labels="gold"), G(seed=0)) > 1e-2


def test_bfloat16_model_is_close(rows):
    model = build_model("olmo2")
    exact = collect_factors(model, batched(rows, 3), labels="gold")
    rounded = collect_factors(copy.deepcopy(model).bfloat16(), batched(rows, 3), labels="gold")
    for name, factors in exact.items():  # bfloat16 has 8 bits: the model's own rounding
        assert relative_error(rounded[name].A, factors.A) < 2e-2
        assert relative_error(rounded[name].G, factors.G) < 6e-2


def test_wrong_no_valid_token():
    model = build_model("olmo2")
    with pytest.raises(InputError, match="no valid token"):
        collect_factors(model, [{"input_ids": torch.ones(2, 1, dtype=torch.long)}])
    with pytest.raises(InputError, match="no valid token"):
        collect_factors(model, [])


def test_wrong_nan_names_the_layer(rows):
    model = build_model("olmo2")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"batch 0: the input of model\.layers\.1\.mlp\.down_proj"):
        collect_factors(model, batched(rows, 3))


def test_wrong_batch():
    model = build_model("olmo2")
    with pytest.raises(InputError, match="input_ids"):
        collect_factors(model, [{"text": "x"}])
    with pytest.raises(InputError, match=r"attention_mask has shape \[1, 3\]"):
        collect_factors(model, [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}])
    with pytest.raises(InputError, match="sampled or gold"):
        collect_factors(model, [], labels="true")


def test_bfloat16_products_are_exact(rows):
    """Against the very activations and gradients of the bfloat16 model, summed in float64: no rounding of ours."""
    model = build_model("olmo2", torch.bfloat16).requires_grad_(False)
    ids = torch.tensor([rows[0], rows[2], rows[5]])
    found = collect_factors(model, [{"input_ids": ids}], blocks=[1, 2], labels="gold")
    seen = {}
    for name in found:
        layer = model.get_submodule(name)

        def remember(m, a, o, name=name):
            o.requires_grad_(True) if not o.requires_grad else None
            o.register_hook(
                lambda g: seen.update({name: (a[0].detach().flatten(0, 1).double(), g.flatten(0, 1).double())})
            )

        layer.register_forward_hook(remember)
    loss = FisherLoss("gold")
    next(iter(loss.draws(model, loss.prepare({"input_ids": ids}), 8))).backward()
    for name, (a, g) in seen.items():
        assert relative_error(found[name].A, a.T @ a / len(a)) < 1e-6
        assert relative_error(found[name].G, g.T @ g / len(g)) < 1e-6
    assert len(seen) == 6
