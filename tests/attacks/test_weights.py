"""Attacks on weights against slow loops, on every kind of layer, and that they leave no trace."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_kfac import InputError
from lightning_kfac.attacks.attack import attacked_layers
from lightning_kfac.attacks.noise import Noise
from lightning_kfac.attacks.pruning import Pruning, pruned
from lightning_kfac.attacks.quantization import Quantization, nf4, nf4_levels, rounded
from tests.common import build_model, generator
from tests.mixtures import build_mixture

ATTACKS = [Quantization("int8"), Quantization("int4"), Quantization("nf4"), Noise(0.05), Pruning(0.4)]


def weight(rows=5, columns=300, dtype=torch.float64):
    W = torch.randn(rows, columns, generator=generator(3), dtype=torch.float64)
    W[2] = 0  # nothing to scale
    W[3, 7] = 40.0  # an outlier
    return W.to(dtype)


def in_a_loop(W, group, value_of):
    """Each weight by itself, from the largest magnitude of its group."""
    found = W.clone()
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            start = j - j % group
            largest = max(abs(w) for w in W[i, start : start + group].tolist())
            found[i, j] = value_of(W[i, j].item(), largest) if largest else 0.0
    return found


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 128), (4, 7), (4, 1000), (2, 3)])
def test_whole_numbers_are_those_of_a_loop(bits, group):
    W = weight()
    most = 2 ** (bits - 1) - 1

    def value_of(w, largest):
        q = round(w / (largest / most))
        assert -most <= q <= most
        return q * (largest / most)

    expected = in_a_loop(W, group or W.shape[1], value_of)
    assert torch.allclose(rounded(W, bits, group), expected, rtol=0, atol=1e-14)
    assert torch.equal(rounded(W, bits, group)[2], W[2])


@pytest.mark.parametrize("group", [64, 128, 7])  # 300 inputs: the last group is shorter
def test_nf4_takes_the_nearest_value(group):
    W = weight()
    levels = nf4_levels().tolist()
    expected = in_a_loop(W, group, lambda w, m: min(levels, key=lambda level: abs(w / m - level)) * m)
    assert torch.allclose(nf4(W, group), expected, rtol=0, atol=1e-14)


def test_nf4_has_the_published_values():
    """Dettmers et al. (2023), appendix E; printed there in float32."""
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert nf4_levels().tolist() == pytest.approx(published, abs=2e-7)


def test_errors_of_quantization_are_bounded_and_values_stay():
    W = weight(dtype=torch.float32)
    scale = W.abs().amax(1, keepdim=True) / 127
    eight = rounded(W, 8)
    assert ((eight - W).abs() <= scale / 2 + 1e-7 * W.abs()).all()
    for attack in (Quantization("int8"), Quantization("int4", group=50)):
        once = attack.changed(W, "any")
        assert torch.allclose(attack.changed(once, "any"), once, rtol=1e-6, atol=0)  # it is on the grid already
    assert rounded(W, 4, 128).unique().numel() <= 1 + 14 * 4 * 3  # rows that are not zero, groups


@pytest.mark.parametrize("norm", [0.0, 1e-3, 0.1, 2.0])
def test_noise_has_its_norm_and_depends_on_nothing_but_its_key(norm):
    W = weight()
    moved = Noise(norm, seed=4).changed(W, "up")
    assert (moved.double() - W.double()).norm() == pytest.approx(norm * W.double().norm().item(), rel=1e-6)
    torch.manual_seed(9)  # of anybody
    assert torch.equal(Noise(norm, seed=4).changed(W, "up"), moved)
    if norm:
        assert not torch.equal(Noise(norm, seed=5).changed(W, "up"), moved)
        assert not torch.equal(Noise(norm, seed=4).changed(W, "down"), moved)


def test_noise_is_normal():
    N = Noise(1.0).changed(torch.ones(300, 300, dtype=torch.float64), "up") - 1
    assert N.mean().abs() < 4 / 300 and (N**4).mean() / N.var() ** 2 == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_pruning_takes_the_smallest_of_a_loop(share):
    W = weight(columns=31)
    order = sorted(range(W.numel()), key=lambda n: (abs(W.flatten()[n].item()), n))
    expected = W.flatten().clone()
    for n in order[: round(share * W.numel())]:
        expected[n] = 0
    assert torch.equal(pruned(W, share), expected.view(W.shape))


def test_ties_are_pruned_in_order_and_no_more_than_the_share():
    W = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 5.0, 1.0]])
    assert pruned(W, 0.5).tolist() == [[0, 0, 0], [-1, 5, 1]]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.label)
@pytest.mark.parametrize("family", ["olmo2", "gpt2", "olmoe", "gpt_oss"])
def test_all_layers_but_the_head_are_hit_and_come_back(attack, family):
    model = build_model(family, dtype=torch.bfloat16) if family in ("olmo2", "gpt2") else build_mixture(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
    } | {name for name in before if "experts" in name and before[name].ndim == 3}
    with attack.on(model):
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name not in linear), name
    with pytest.raises(ZeroDivisionError), attack.on(model):
        1 / 0  # noqa: B018
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_scales_run_along_the_inputs_of_transposed_and_fused_weights():
    gpt2, mixture = build_model("gpt2"), build_mixture("gpt_oss")
    attn = gpt2.transformer.h[0].attn.c_attn
    up = mixture.model.layers[0].mlp.experts.gate_up_proj
    expected = rounded(attn.weight.data.T, 4, 128).T.clone(), rounded(up.data[1].T, 4, 128).T.clone()
    for model, found in ((gpt2, lambda: attn.weight), (mixture, lambda: up[1])):
        with Quantization("int4").on(model):
            assert torch.allclose(found(), expected[model is mixture], atol=1e-7)


def test_noise_on_a_model_has_its_norm_in_every_layer():
    model = build_model("olmo2", tie_word_embeddings=True)
    before = {name: layer.W.double().clone() for name, layer in attacked_layers(model).items()}
    assert len(before) == 3 * 7  # four of the attention, three of the MLP
    with Noise(0.02).on(model):
        for name, layer in attacked_layers(model).items():
            change = (layer.W.double() - before[name]).norm() / before[name].norm()
            assert change.item() == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantization("fp3"), "choose from int8, int4, nf4"),
        (lambda: Quantization(group=0), "at least 1"),
        (lambda: Noise(-0.1), "norm is -0.1"),
        (lambda: Noise(math.nan), "norm is nan"),
        (lambda: Pruning(1.5), "share is 1.5"),
        (lambda: attacked_layers(nn.Linear(2, 2)), "not a language model"),
    ],
)
def test_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_quantized_model_is_refused():
    model = build_model("olmo2")
    packed = torch.zeros(24, 24, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj .*without quantization"), Noise().on(model):
        pass
