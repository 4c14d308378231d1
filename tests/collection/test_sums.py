"""Sums over positions: products of a bfloat16 model, and EK-FAC moments."""

import copy

import pytest
import torch

from lightning_kfac import collect_factors
from lightning_kfac.collection.collect import collect_moments
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.math.spectrum import eigenbasis
from tests.common import batched, build_model, projections_of, relative_error


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


@pytest.mark.parametrize("moments", ["token", "sequence"])
def test_moments_are_those_of_brute_force(any_model, rows, moments):
    settings = {"projections": projections_of(any_model), "labels": "gold"}
    factors = collect_factors(any_model, batched(rows, 3), **settings)
    found = collect_moments(any_model, batched(rows, 3), factors, moments=moments, labels="gold")
    model = copy.deepcopy(any_model).double()
    bases = {n: (eigenbasis(f.G).vectors, eigenbasis(f.A).vectors) for n, f in factors.items()}
    expected = {n: 0 for n in factors}
    for row in rows:
        seen, handles = {}, []
        for name in factors:
            layer = model.get_submodule(name)

            def remember(m, a, o, name=name, seen=seen):
                o.retain_grad()
                seen[name] = (a[0].detach()[0], o)

            handles.append(layer.register_forward_hook(remember))
        logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        (-sum(logits[t, row[t + 1]] for t in range(len(row) - 1))).backward()
        for handle in handles:
            handle.remove()
        for name, (a, output) in seen.items():
            U_G, U_A = bases[name]
            gradients = [torch.outer(U_G.T @ output.grad[0, t], U_A.T @ a[t]) for t in range(len(row) - 1)]
            expected[name] += sum(g**2 for g in gradients) if moments == "token" else sum(gradients) ** 2
    n = sum(len(row) - 1 for row in rows)
    for name in factors:
        assert relative_error(found[name], expected[name] / n) < 1e-5
