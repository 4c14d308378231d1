"""The coupling of layers to margins against plain autograd in float64, one layer at a time."""

import copy

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.collection.coupling import best_window, layer_coupling, ratios
from lightning_kfac.math.loss import margins
from lightning_kfac.models.targets import resolve_targets
from tests.common import batched, build_model, generator, projections_of


def test_margins_by_hand():
    logits = torch.randn(6, 9, generator=generator(0), dtype=torch.float64)
    logits[3] = 1.0  # all alike
    targets = torch.tensor([0, 8, 4, 2, -100, 5])
    found = margins(logits, targets)
    for t, target in enumerate(targets.tolist()):
        others = [logits[t, v].item() for v in range(9) if v != target]
        assert found[t].item() == (0 if target < 0 else logits[t, target].item() - max(others))


def coupling_by_hand(model, name, rows):
    """Mean of ||a||^2 ||d sum of margins / d z||^2, one row and one layer at a time."""
    model = copy.deepcopy(model).double()
    layer = dict(model.named_modules())[name]
    total, count = 0.0, 0
    for row, labelled in rows:
        seen = {}

        def remember(module, args, output, seen=seen):
            output.retain_grad()
            seen["a"], seen["z"] = args[0][0].detach(), output

        handle = layer.register_forward_hook(remember)
        logits = model(input_ids=torch.tensor([row])).logits[0]
        margin = 0
        for t in range(len(row) - 1):
            if labelled[t + 1]:
                others = torch.cat([logits[t, : row[t + 1]], logits[t, row[t + 1] + 1 :]])
                margin = margin + logits[t, row[t + 1]] - others.max()
        margin.backward()
        handle.remove()
        g = seen["z"].grad.view(-1, seen["z"].shape[-1])
        for t in range(len(row) - 1):
            if labelled[t + 1]:
                total += float(seen["a"][t] @ seen["a"][t]) * float(g[t] @ g[t])
                count += 1
    return total / count


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (3, "left"), (99, "right")])
def test_against_autograd(any_model, rows, size, side):
    rows = [row for row in rows if len(row) > 1]
    layers = resolve_targets(any_model, [0, 2], projections_of(any_model))
    found = layer_coupling(any_model, batched(rows, size, side), layers)
    for name in layers:
        expected = coupling_by_hand(any_model, name, [(row, [True] * len(row)) for row in rows])
        assert found[name] == pytest.approx(expected, rel=1e-4), name


def test_of_suffixes_alone(rows):
    """As of memorized sequences: only labelled tokens have margins, and only their positions count."""
    model = build_model("llama")
    rows = [row for row in rows if len(row) > 4]
    batches, labelled = [], []
    for row in rows:
        labels = torch.tensor([row]).clone()
        labels[0, :3] = -100
        batches.append({"input_ids": torch.tensor([row]), "labels": labels})
        labelled.append((row, [False] * 3 + [True] * (len(row) - 3)))
    layers = resolve_targets(model, [1], ["up", "down"])
    found = layer_coupling(model, batches, layers)
    for name in layers:
        assert found[name] == pytest.approx(coupling_by_hand(model, name, labelled), rel=1e-4)


def test_ratios_and_windows():
    assert ratios({"a": 4.0, "b": 1.0, "c": 0.0}, {"a": 2.0, "b": 4.0, "c": 0.0}) == {"a": 2.0, "b": 0.25}
    assert best_window({5: 1.0}, 3) == [5] and best_window({0: 1.0, 1: 1.0, 2: 1.0}, 2) == [0, 1]


def test_a_text_without_labels_is_refused(rows):
    model = build_model("llama")
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.full((1, 3), -100)}
    with pytest.raises(InputError, match="no valid token"):
        layer_coupling(model, [batch], resolve_targets(model, [1], ["up"]))
