"""What a capture keeps of the layers: whatever their inputs look like, and no more than needed."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.models.targets import resolve_targets
from tests.common import TOLERANCE, assert_same, batched, build_model, padded, projections_of, relative_error
from tests.oracle import one_row_factors


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


def test_dense_batches_equal_masked_ones(any_model, rows):
    ids = torch.tensor([rows[0], rows[2], rows[5]])
    settings = {"projections": projections_of(any_model)}
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert_same(
        collect_factors(any_model, [{"input_ids": ids}], **settings), collect_factors(any_model, [masked], **settings)
    )


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_models_that_flatten_or_write_in_place(family, rows):
    """OPT hands rows and positions to its MLP as one dimension; Falcon adds to outputs in place."""
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "pad_token_id": 0,
    }
    settings |= {"ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 64} if family == "opt" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    names = [r".*fc[12]"] if family == "opt" else [r".*mlp\.dense.*"]
    alone = collect_factors(model, [{"input_ids": torch.tensor([row])} for row in rows], modules=names, labels="gold")
    together = collect_factors(model, batched(rows, 3), modules=names, labels="gold")
    expected = one_row_factors(copy.deepcopy(model), list(alone), rows, [row[1:] for row in rows])
    assert_same(together, alone)
    for name, (A, G, n) in expected.items():
        assert alone[name].n_tokens == n
        assert relative_error(alone[name].A, A.reshape(len(A), -1)) < TOLERANCE
        assert relative_error(alone[name].G, G) < TOLERANCE


class Unusual(nn.Module):
    """Layers called by keyword, changed in place afterwards, and used more than once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.keyword = nn.Linear(4, 4)
        self.place = nn.Linear(4, 4)
        self.later = nn.Linear(4, 4)  # reads the changed tensor: not the input of `place`
        self.twice = nn.Linear(4, 4)
        self.once = nn.Linear(4, 4)  # reads what `twice` reads first

    def forward(self, x):
        x = 1.5 * self.keyword(input=x)
        z = self.place(x)
        x.mul_(2).add_(z)
        x = torch.tanh(x + self.later(x))
        y = self.twice(x) + self.once(x)
        return self.twice(torch.tanh(y))


def autograd_factors(network, inputs):
    """Every call of a layer, every position, by plain autograd in float64; the inputs are copied at the call."""
    network = network.double().requires_grad_(False)
    calls = {}

    def remember(layer, args, kwargs, output):
        output.requires_grad_(True).retain_grad()
        (a,) = (*args, *kwargs.values())
        calls.setdefault(layer, []).append((a.detach().clone(), output))
        return output.clone()  # so that nothing changes it in place

    handles = [layer.register_forward_hook(remember, with_kwargs=True) for layer in network.children()]
    network(inputs.double()).pow(3).sum().backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, layer in network.named_children():
        A = sum(a.flatten(0, -2).T @ a.flatten(0, -2) for a, _ in calls[layer])
        G = sum(z.grad.flatten(0, -2).T @ z.grad.flatten(0, -2) for _, z in calls[layer])
        n = sum(a[..., 0].numel() for a, _ in calls[layer])
        found[name] = A / n, G / n, n
    return found


def test_layers_called_in_unusual_ways():
    inputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    network = Unusual()
    found = collect_factors(
        network,
        [{"x": inputs[:2]}, {"x": inputs[2:]}],
        modules=[".*"],
        loss_fn=lambda network, batch: network(batch["x"]).pow(3).sum(),
    )
    for name, (A, G, n) in autograd_factors(network, inputs).items():
        assert found[name].n_tokens == n == (30 if name == "twice" else 15)
        assert relative_error(found[name].A, A) < 1e-6, name
        assert relative_error(found[name].G, G) < 1e-6, name
    assert len({id(factors.A) for factors in found.values()}) == 5


def operations(loss):
    """All operations of a loss's backward."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        operation = waiting.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            waiting += [following for following, _ in operation.next_functions]
    return [type(operation).__name__ for operation in seen]


@pytest.mark.parametrize("blocks", [[0], [2]])
@pytest.mark.parametrize("leftover", ["input gradients", "a hook before a block"])
def test_leftover_input_gradients_cost_nothing(blocks, leftover, monkeypatch):
    """The graph begins at the lowest target, whatever hooks an earlier training has left."""
    losses = []
    run = FisherLoss.draws

    def draws(self, *arguments):
        for loss in run(self, *arguments):
            losses.append(operations(loss))
            yield loss

    monkeypatch.setattr(FisherLoss, "draws", draws)
    batches = [{"input_ids": torch.arange(1, 13).view(2, 6)}]
    model = build_model("olmo2")
    expected = collect_factors(model, batches, blocks=blocks, projections=["up"])
    plain = sorted(losses[-1])
    if leftover == "input gradients":
        model.enable_input_require_grads()
    else:
        model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0].requires_grad_(True),))
    found = collect_factors(model, batches, blocks=blocks, projections=["up"])
    assert sorted(losses[-1]) == plain
    for name, factors in expected.items():
        assert torch.equal(found[name].A, factors.A) and torch.equal(found[name].G, factors.G)
    ids = batches[0]["input_ids"]
    assert model(input_ids=ids).logits.requires_grad  # the hook is as it was


def test_wrong_width():
    with pytest.raises(InputError, match="vectors of 5 numbers cannot be added to a sum of 4 x 4"):
        SecondMoment(4).add(torch.ones(3, 5))


def test_wrong_order_of_rows_and_positions():
    """A mask [B, T] says nothing of an input [T, B, d], although it has as many entries."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    network = Turned()
    layers = resolve_targets(network, modules=["layer"])
    with CurvatureCapture(layers) as capture:
        network.requires_grad_(False)
        capture.begin(torch.ones(2, 3, dtype=torch.bool), (2, 3))
        with pytest.raises(InputError, match=r"layer has an input of shape \[3, 2, 4\], not one vector for each"):
            network(torch.ones(2, 3, 4)).sum().backward()
