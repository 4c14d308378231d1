"""Energies of a model's inputs against a loop over them."""

import pytest
import torch

from lightning_kfac import collect_factors
from lightning_kfac.evaluation.excitation import excitation, layer_forms
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.math.bands import energies
from lightning_kfac.models.layers import find_layers
from tests.common import VOCAB, build_model, generator


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
        only = layer_forms(model, {name: factors[name]}, BasisCache(), 1)[name].bands[0]
        x = torch.cat(rows[:3])
        for side, values, seen in (("A", layer.inputs[0], x), ("G", layer.outputs[0], x @ weight.T)):
            _, vectors = torch.linalg.eigh(getattr(factors[name], side).double())
            squares = [sum((v @ row).item() ** 2 for row in seen) for v in vectors.flip(1).T]
            assert values == pytest.approx(squares, rel=1e-3, abs=1e-6 * max(squares))
        assert energies(only[None], x.T @ x).item() == pytest.approx(sum(whole[:3]), rel=1e-5)
    for name in factors:
        model.get_submodule(name)._forward_pre_hooks.clear()
