"""Band profiles against loops over components and tokens."""

import math

import numpy as np
import pytest
import torch

from lightning_kfac import collect_factors
from lightning_kfac.evaluation.excitation import excitation, layer_forms
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.math.bands import band_forms, band_masks, band_ratios, band_shares, energies
from lightning_kfac.models.layers import find_layers
from tests.common import VOCAB, build_model, descending, generator


@pytest.mark.parametrize("n_bands", [1, 4, 10])
def test_bands_are_of_equal_count_and_in_order(n_bands):
    importance = torch.rand(9, 7, generator=generator(), dtype=torch.float64).round(decimals=1)  # with ties
    masks = band_masks(importance, n_bands)
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(9, 7, dtype=torch.long))
    order = sorted(range(63), key=lambda k: (-importance.flatten()[k].item(), k))
    for number, mask in enumerate(masks):
        expected = order[round(63 * number / n_bands) : round(63 * (number + 1) / n_bands)]
        assert mask.flatten().nonzero().flatten().tolist() == sorted(expected)


def test_energies_are_a_loop_over_tokens():
    d_out, d_in, n = 9, 7, 20
    W, X = (
        torch.randn(*s, generator=generator(i), dtype=torch.float64) for i, s in enumerate([(d_out, d_in), (n, d_in)])
    )
    U_G, U_A = (
        torch.linalg.qr(torch.randn(d, d, generator=generator(d), dtype=torch.float64))[0] for d in (d_out, d_in)
    )
    C, masks = U_G.T @ W @ U_A, band_masks(torch.outer(descending(d_out, 2), descending(d_in, 3)), 4)
    found = energies(band_forms(C, U_A, masks), X.T @ X)
    expected = [sum(((U_G @ (C * mask) @ U_A.T) @ x).square().sum().item() for x in X) for mask in masks]
    expected.append(sum((W @ x).square().sum().item() for x in X))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # the forms are float32


def test_shares_and_ratios_with_intervals():
    rng = np.random.default_rng(0)
    shards, others = rng.uniform(1, 2, (24, 4)), rng.uniform(2, 3, (16, 4))
    counts, other_counts = np.full(24, 10), rng.integers(5, 20, 16)
    shares = band_shares(shards)
    assert shares.value == pytest.approx(np.sqrt(shards.sum(0)[:3] / shards.sum(0)[3]), rel=1e-12)
    ratios = band_ratios(shards, counts, others, other_counts)
    per_input = shards.sum(0)[:3] / 240, others.sum(0)[:3] / other_counts.sum()
    assert ratios.value == pytest.approx(np.sqrt(per_input[0] / per_input[1]), rel=1e-12)
    for bands in (shares, ratios):
        assert (bands.low < bands.value).all() and (bands.value < bands.high).all()
    # A bootstrap by hand, with other draws.
    draws = []
    for _ in range(3000):
        a, b = rng.integers(0, 24, 24), rng.integers(0, 16, 16)
        x, y = shards[a, 0].sum() / counts[a].sum(), others[b, 0].sum() / other_counts[b].sum()
        draws.append(math.sqrt(x / y))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (ratios.low[0], ratios.high[0]) == tuple(pytest.approx(v, abs=0.08 * (high - low)) for v in (low, high))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_excitation_of_a_model_is_a_loop_over_its_inputs(family):
    """Padding does not count, layers that share an input share its sums, Conv1D weights are the right way round."""
    model = build_model(family).requires_grad_(False)
    projections = ["gate", "up", "down"] if family == "llama" else ["up", "down"]
    ids = torch.randint(1, VOCAB, (6, 12), generator=generator(4))
    factors = collect_factors(model, [{"input_ids": ids}], blocks=[1], projections=projections)
    forms = layer_forms(model, factors, BasisCache.beside(factors), 5)
    mask = torch.ones_like(ids)
    mask[2, 7:] = 0
    batches = [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:]}]
    found = excitation(model, factors, forms, [[batches[0]], [batches[1]]])
    inputs = {}
    for name in factors:
        hook = lambda layer, args, name=name: inputs.setdefault(name, []).append(args[0].double())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    for row, length in zip(ids, [12, 12, 7, 12, 12, 12], strict=True):
        model(row[None, :length])
    for name, layer in found.items():
        weight = find_layers(model)[name].W.double()
        rows = [x[0, :-1] for x in inputs[name]]  # the last token has no next one
        whole = [sum((weight @ x).square().sum().item() for x in row) for row in rows]
        assert layer.counts.tolist() == [11 + 11 + 6, 33]
        assert layer.energies[:, -1] == pytest.approx([sum(whole[:3]), sum(whole[3:])], rel=1e-5)
        # Bands of disjoint rows and columns need not add up; one band that holds everything does.
        (only,) = layer_forms(model, {name: factors[name]}, BasisCache(), 1)[name][:1]
        x = torch.cat(rows[:3])
        assert energies(only[None], x.T @ x).item() == pytest.approx(sum(whole[:3]), rel=1e-5)
    for name in factors:
        model.get_submodule(name)._forward_pre_hooks.clear()
