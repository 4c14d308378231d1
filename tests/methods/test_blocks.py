"""Edits of a block of the curvature basis against plain float64 loops and autograd."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.editing.curvature import Basis
from lightning_kfac.math.spectrum import eigenbasis
from lightning_kfac.methods.blocks import BlockDeletion, BlockNoise, CoherentStep
from lightning_kfac.methods.margins import margin_gradients
from lightning_kfac.models.targets import resolve_targets
from tests.common import build_model, generator
from tests.modules.test_sequence_training import made

BLOCKS = [
    {"share": 0.6},
    {"block": "head", "share": 0.25},
    {"block": "quintile", "quintile": (5, 1)},
    {"share": 1.0},
    {"share": 0.0},
]


def weight_and_basis(d_out=20, d_in=15):
    spectra = []
    for d in (d_out, d_in):
        x = torch.randn(40, d, generator=generator(d), dtype=torch.float64)
        spectra.append(eigenbasis(x.T @ x, "matrix", torch.float64))
    return torch.randn(d_out, d_in, generator=generator(9), dtype=torch.float64), Basis(*spectra)


def components(W, basis):
    return basis.G.vectors.T @ W @ basis.A.vectors


def in_block(settings, d_out=20, d_in=15):
    """The mask of a block of components, by its definition."""
    share = settings.get("share")
    mask = torch.zeros(d_out, d_in, dtype=torch.bool)
    if settings.get("block") == "quintile":
        mask[16:20, 0:3] = True
    elif settings.get("block") == "head":
        mask[:5, :4] = True
    else:
        mask[d_out - round(share * d_out) :, d_in - round(share * d_in) :] = True
    return mask


@pytest.mark.parametrize("settings", BLOCKS)
def test_a_deleted_block_is_gone_and_its_complement_gives_the_weight_back(settings):
    W, basis = weight_and_basis()
    W = W.float().double()
    deletion = BlockDeletion(**settings)
    after = deletion.changed(W, basis, "up", None)
    C = components(W, basis)
    assert torch.allclose(components(after, basis), C * ~in_block(settings), rtol=0, atol=1e-12)
    assert torch.equal((after + deletion.part(W, basis)).float(), W.float())


@pytest.mark.parametrize("settings", BLOCKS)
def test_noise_has_the_norm_of_the_block_and_stays_in_it(settings):
    W, basis = weight_and_basis()
    noise = BlockNoise(**settings).changed(W, basis, "up", None) - W
    inside = in_block(settings)
    C = components(W, basis)
    assert noise.norm().item() == pytest.approx((C * inside).norm().item(), rel=1e-6)
    assert (components(noise, basis) * ~inside).norm() < 1e-12
    again = BlockNoise(**settings).changed(W, basis, "up", None) - W
    others = [BlockNoise(**settings, seed=1).changed(W, basis, "up", None) - W]
    others.append(BlockNoise(**settings).changed(W, basis, "gate", None) - W)
    assert torch.equal(again, noise)
    assert not inside.any() or not any(torch.allclose(other, noise) for other in others)


def plain_margins(model, rows):
    """Sum over the suffix tokens of the gold logit less the largest other one."""
    total = 0.0
    for row in rows:
        ids = [*row.prefix, *row.suffix]
        logits = model(torch.tensor([ids])).logits[0]
        for place in range(max(1, len(row.prefix)), len(ids)):
            z = logits[place - 1]
            others = torch.cat([z[: ids[place]], z[ids[place] + 1 :]])
            total = total + z[ids[place]] - others.max()
    return total


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])  # GPT-2 stores weights transposed
def test_the_coherent_direction_is_that_of_autograd(family):
    changes = {"num_hidden_layers": 2} if family == "olmo2" else {"n_layer": 2}
    model = build_model(family, torch.float64, **changes)
    layers = resolve_targets(model, [0, 1], ["up"])
    found = margin_gradients(model, layers, made(), batch_size=2)
    before = [p.requires_grad for p in model.parameters()]
    plain_margins(model, made()).backward()
    assert all(before) and list(found) == list(layers)
    for name, layer in layers.items():
        M = layer.matrix(layer.parameter.grad)
        assert torch.allclose(found[name], M, rtol=1e-9, atol=1e-12)
        W, basis = weight_and_basis(*layer.shape)
        after = CoherentStep(nu=0.5, share=0.6).changed(W, basis, name, found[name])
        rows, columns = (n - round(0.6 * n) for n in W.shape)
        G, A = basis.G.vectors[:, rows:], basis.A.vectors[:, columns:]
        P = G @ G.T @ M @ A @ A.T
        assert torch.allclose(after, W - 0.5 * P / P.norm(), rtol=0, atol=1e-12)
        assert (after - W).norm().item() == pytest.approx(0.5, rel=1e-9)


def test_a_small_coherent_step_lowers_the_margins_as_its_gradient_says():
    model = build_model("olmo2", torch.float64, num_hidden_layers=2)
    layers = resolve_targets(model, [1], ["up"])
    (layer,) = layers.values()
    M = margin_gradients(model, layers, made(), batch_size=2)[layer.name]
    _, basis = weight_and_basis(*layer.shape)
    step = CoherentStep(nu=1e-4)
    after = step.changed(layer.W.clone(), basis, layer.name, M)
    expected = (M * (after - layer.W)).sum().item()
    with torch.no_grad():
        first = plain_margins(model, made()).item()
        layer.parameter.copy_(after)
        assert plain_margins(model, made()).item() - first == pytest.approx(expected, rel=1e-2) and expected < 0


def test_a_step_without_a_direction_is_refused():
    W, basis = weight_and_basis()
    with pytest.raises(InputError, match="coherent_step: up: no direction is left in the flat block; raise share"):
        CoherentStep(share=0.0).changed(W, basis, "up", W)
