"""Forecasts of an edit's cost against every token's shift in float64, finite differences and the measured change."""

import copy

import pytest
import torch

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.shifts import forecast
from lightning_kfac.models.layers import find_layers
from tests.collection.test_coupled import token_pairs
from tests.common import batched, build_model, generator
from tests.mixtures import build_mixture
from tests.oracle import sampled_targets


def changes_of(model, names, scale=0.05, seed=0):
    """Noise of a share of each weight's size."""
    layers = find_layers(model)
    noise = {name: torch.randn(layers[name].shape, generator=generator(seed)) for name in names}
    return {name: scale * layers[name].W.norm() * dW / dW.norm() for name, dW in noise.items()}


def mean_loss(model, rows):
    """Of a token, one row at a time, in float64."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row[:-1]])).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").item()
        count += len(row) - 1
    return total / count


def in_float64(model):
    """A copy; experts run one by one, since grouped products know no float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    return model


def changed(model, change):
    """A copy in float64 with other weights."""
    model = in_float64(model)
    layers = find_layers(model)
    with torch.no_grad():
        for name, dW in change.items():
            layers[name].write(layers[name].parameter, layers[name].W + dW.double())
    return model


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (3, "left"), (99, "right")])
@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_against_every_token(family, rows, size, side):
    """Two edits in one pass, of different layers; s_t by a loop over tokens."""
    model = build_model(family)
    rows = [row for row in rows if len(row) > 1]
    up, down = list(collect_factors(model, batched(rows, 3), blocks=[1], projections=["up", "down"]))
    both, one = changes_of(model, [up, down]), changes_of(model, [down], seed=3)
    found = forecast(model, batched(rows, size, side), [both, one], seed=5)
    double = copy.deepcopy(model).double()
    labels = {"gold": [row[1:] for row in rows], "sampled": sampled_targets(double, rows, seed=5)}
    pairs = {kind: token_pairs(double, [up, down], rows, targets) for kind, targets in labels.items()}
    n = sum(len(row) - 1 for row in rows)
    for change, result in zip((both, one), found, strict=True):
        shifts = {
            kind: {
                name: torch.stack([y @ dW.double() @ x for x, y in zip(*pairs[kind][name], strict=True)])
                for name, dW in change.items()
            }
            for kind in labels
        }
        assert result.n_tokens == n and result.layers.keys() == change.keys()
        for name in change:
            assert result.layers[name].first == pytest.approx(shifts["gold"][name].sum().item() / n, rel=1e-4)
            assert result.layers[name].second == pytest.approx(
                (shifts["sampled"][name] ** 2).mean().item() / 2, rel=1e-4
            )
        all_gold, all_sampled = sum(shifts["gold"].values()), sum(shifts["sampled"].values())
        by_row = torch.stack([part.sum() for part in all_sampled.split([len(row) - 1 for row in rows])])
        assert result.total.first == pytest.approx(all_gold.sum().item() / n, rel=1e-4)
        assert result.total.second == pytest.approx((all_sampled**2).sum().item() / 2 / n, rel=1e-4)
        assert result.total.second_by_rows == pytest.approx((by_row**2).sum().item() / 2 / n, rel=1e-4)
        assert result.total.total == result.total.first + result.total.second


def test_a_shift_is_the_finite_difference_of_the_loss():
    """Of one token that predicts another, s_t is the derivative of that token's loss along the edit."""
    model = build_model("llama")
    names = list(collect_factors(model, batched([[3, 4]], 1), blocks=[0, 2], projections=["gate", "down"]))
    change = changes_of(model, names)
    for row in ([3, 9], [17, 2], [40, 41]):
        (found,) = forecast(model, batched([row], 1), [change])
        step = 0.02  # float32 within the norms of a float64 model is noise of 1e-7
        ahead = changed(model, {name: step * dW for name, dW in change.items()})
        behind = changed(model, {name: -step * dW for name, dW in change.items()})
        slope = (mean_loss(ahead, [row]) - mean_loss(behind, [row])) / (2 * step)
        assert found.total.first == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_the_forecast_is_the_measured_change_of_small_edits(rows):
    """Its ratio to the measured change tends to 1 as the edit is scaled down."""
    model = build_model("qwen3")
    rows = [row for row in rows if len(row) > 1]
    names = list(collect_factors(model, batched(rows, 3), blocks=[0, 1, 2], projections=["up", "down"]))
    whole = changes_of(model, names, scale=0.05)
    before = mean_loss(in_float64(model), rows)
    for scale, tolerance in ((0.1, 0.05), (0.03, 0.02), (0.01, 0.01)):
        change = {name: scale * dW for name, dW in whole.items()}
        (found,) = forecast(model, batched(rows, 3), [change])
        assert found.total.total / (mean_loss(changed(model, change), rows) - before) == pytest.approx(1, abs=tolerance)


def test_experts():
    """Of the tokens that came to each; of all layers together, position by position."""
    text = [torch.randint(1, 61, (n,), generator=generator(n)).tolist() for n in (9, 5, 7)]
    model = build_mixture("olmoe")
    found = collect_factors(model, batched(text, 3), projections=["expert_up", "expert_down"], labels="gold")
    change = changes_of(model, [name for name in found if found[name].n_tokens])
    (result,) = forecast(model, batched(text, 2), [change])
    assert result.total.first == pytest.approx(sum(shift.first for shift in result.layers.values()), rel=1e-6)
    small = {name: 0.01 * dW for name, dW in change.items()}
    (result,) = forecast(model, batched(text, 2), [small])
    measured = mean_loss(changed(model, small), text) - mean_loss(in_float64(model), text)
    assert result.total.total / measured == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.mlp.up_proj": torch.zeros(40, 24)}, r"no layer model\.layers\.9\.mlp\.up_proj"),
        ({"model.layers.1.mlp.up_proj": torch.zeros(24, 40)}, r"the change is \[24, 40\], the weight \[40, 24\]"),
        ({}, "nothing changes"),
    ],
)
def test_wrong_changes(rows, change, message):
    with pytest.raises(InputError, match=message):
        forecast(build_model("olmo2"), batched(rows, 3), [change])
