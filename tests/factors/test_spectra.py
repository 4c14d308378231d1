"""Spectra of layers against a loop over sorted products."""

import pytest
import torch

from lightning_kfac.factors.spectra import CURVE, by_projection, layer_spectrum
from lightning_kfac.math.spectrum import effective_rank
from tests.common import descending


def test_curve_is_a_loop_over_sorted_products():
    lambdas, mu = descending(7, 0), descending(5, 1)
    spectrum = layer_spectrum(lambdas, mu, rho=0.6)
    products = sorted((a * b for a in lambdas.tolist() for b in mu.tolist()), reverse=True)
    total = sum(products)
    for kept, mass in zip(*spectrum.curve, strict=True):
        count, held = 0, 0.0
        while held < mass * total * (1 - 1e-12):
            held += products[count]
            count += 1
        assert kept == count / 35
    count = round(spectrum.fraction_kept * 35)
    assert sum(products[:count]) >= 0.6 * total > sum(products[: count - 1])
    assert spectrum.rank_A == pytest.approx(effective_rank(mu)) and spectrum.condition_A == (mu[0] / mu[-1]).item()
    assert tuple(spectrum.curve[1]) == CURVE


def test_spectrum_of_nothing():
    spectrum = layer_spectrum(torch.zeros(3), torch.zeros(2), rho=0.5)
    assert spectrum.fraction_kept == 0 and spectrum.numbers()["condition_A"] is None
    assert set(spectrum.curve[0]) == {0.0}


def test_layers_by_projection_and_depth():
    spectrum = layer_spectrum(descending(3, 0), descending(2, 1))
    names = ["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.gate_proj"]
    groups = by_projection(dict.fromkeys(names, spectrum))
    assert {name: list(blocks) for name, blocks in groups.items()} == {"up": [2, 10], "gate": [2]}
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(3)]
    groups = by_projection(dict.fromkeys(experts, spectrum))
    assert {name: list(blocks) for name, blocks in groups.items()} == {f"expert_up {e}": [0] for e in range(3)}
    others = ["model.layers.0.mlp.up_proj", "model.layers.0.second.mlp.up_proj"]
    groups = by_projection(dict.fromkeys(others, spectrum))
    assert {name: list(blocks) for name, blocks in groups.items()} == {"up": [0], others[1]: [0]}
