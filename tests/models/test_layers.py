"""A further kind of layer is one adapter: convolutions, as CONTRIBUTING.md adds them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_factors, save_factors
from lightning_kfac.editing.patch import apply_patch, save_patch
from lightning_kfac.models import layers
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import build_model, relative_error

NAME = "1"


class Conv2dLayer(layers.Layer):
    """A convolution as a product with patches: W [channels out, channels in x kernel]."""

    of = nn.Conv2d

    def matrix(self, stored):
        return self.part(stored).flatten(1)

    def inputs(self, seen):
        conv = self.module
        return F.unfold(seen, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)

    def outputs(self, seen):
        return seen.flatten(2).transpose(1, 2)


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(layers, "KINDS", (*layers.KINDS, Conv2dLayer))
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    return nn.Sequential(nn.Tanh(), convolution, nn.Tanh(), nn.Flatten(), nn.Linear(20, 2))


def images():
    generator = torch.Generator().manual_seed(1)
    return [{"images": torch.randn(n, 3, 4, 4, generator=generator)} for n in (3, 2)]


def loss(network, batch):
    return network(batch["images"]).square().sum()


def expected(network):
    """One image, one place of the output at a time, in float64."""
    network = network.double()
    convolution = network[1]
    A, G, count = 0, 0, 0
    for batch in images():
        for image in batch["images"].double():
            x = torch.tanh(image)[None]
            z = convolution(x).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(network[2:](z).square().sum(), z)
            padded = F.pad(x, (1, 1, 1, 1))[0]
            for i in range(z.shape[2]):
                for j in range(z.shape[3]):
                    patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten()
                    g = gradient[0, :, i, j]
                    A = A + torch.outer(patch, patch)
                    G = G + torch.outer(g, g)
                    count += 1
    network.float()
    return A / count, G / count, count


def test_factors_and_edit_of_a_convolution(network, tmp_path):
    found = collect_factors(network, images(), modules=[NAME], loss_fn=loss)
    A, G, count = expected(network)
    assert found[NAME].shape == (5, 27) and found[NAME].n_tokens == count
    assert relative_error(found[NAME].A, A) < 1e-6 and relative_error(found[NAME].G, G) < 1e-6

    weight = network[1].weight
    before = weight.detach().clone()
    editor = KFACEditor(network, found, EditConfig(rho=0.7))
    unedited = weights_fingerprint(network, [NAME])
    report = editor.apply()
    W = before.double().flatten(1)
    U_G, U_A = (torch.linalg.eigh(factor.double())[1] for factor in (G, A))
    kept = U_G.T @ weight.detach().double().flatten(1) @ U_A
    C = U_G.T @ W @ U_A
    same = (kept - C).abs() < 1e-5
    assert (same | (kept.abs() < 1e-5)).all() and same.sum() >= report.layers[0].n_kept
    assert 0 < report.fraction_kept < 1 and weight.shape == before.shape

    save_patch(network, [NAME], tmp_path / "patch", unedited, {})
    edited = weight.detach().clone()
    editor.restore()
    assert torch.equal(weight, before)
    apply_patch(network, tmp_path / "patch")
    assert torch.equal(weight, edited)
    save_factors(found, tmp_path / "factors")


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_what_an_adapter_sees_is_a_product_with_W(family):
    model = build_model(family)
    name = {"olmo2": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    layer = layers.find_layers(model)[name]
    seen = []
    handle = layer.watch(lambda a, z: seen.append((layer.inputs(a), layer.outputs(z))))
    model(input_ids=torch.arange(1, 7)[None])
    handle.remove()
    ((a, z),) = seen
    bias = getattr(layer.module, "bias", None)
    assert layer.shape == (24, 40)
    assert torch.allclose(a @ layer.W.T + (0 if bias is None else bias), z, atol=1e-5)
    layer.W.zero_()
    assert not layer.parameter.any()


def test_weight_matrix_maps_input_to_output():
    for model, name in ((build_model("gpt2"), "transformer.h.0.mlp.c_fc"), (build_model("olmo2"), "lm_head")):
        layer = dict(model.named_modules())[name]
        x = torch.randn(24)
        bias = layer.bias if getattr(layer, "bias", None) is not None else 0
        assert torch.allclose(layer(x[None])[0] - bias, layers.find_layers(layer)[""].W @ x, atol=1e-5)


class Half(layers.Layer):
    """One of two weights that lie in one parameter, one behind the other."""

    @classmethod
    def find(cls, name, module):
        if isinstance(module, Fused):
            for which in ("gate", "up"):
                yield cls(f"{name}.{which}" if name else which, module)

    @property
    def parameter_name(self):
        return f"{self.name.rpartition('.')[0]}.weight".removeprefix(".")

    def part(self, stored):
        half = len(stored) // 2
        return stored[:half] if self.name.endswith("gate") else stored[half:]

    def outputs(self, seen):
        half = seen.shape[-1] // 2
        return seen[..., :half] if self.name.endswith("gate") else seen[..., half:]


class Fused(nn.Linear):
    """A layer that is two layers."""


def test_two_weights_in_one_parameter_are_edited_and_restored(monkeypatch):
    monkeypatch.setattr(layers, "KINDS", (Half,))
    torch.manual_seed(2)
    network = nn.Sequential(nn.Tanh(), Fused(6, 8, bias=False))
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))

    def loss(network, batch):
        return network(batch["rows"]).pow(4).sum()

    found = collect_factors(network, [{"rows": rows}], modules=[r"1\.(gate|up)"], loss_fn=loss)
    assert {name: layer.shape for name, layer in found.items()} == {"1.gate": (4, 6), "1.up": (4, 6)}
    assert found["1.gate"].A is found["1.up"].A
    a = torch.tanh(rows).double()
    g = 4 * (a @ network[1].weight.detach().double().T) ** 3
    for name, part in (("1.gate", g[:, :4]), ("1.up", g[:, 4:])):
        assert relative_error(found[name].G, part.T @ part / 5) < 1e-6
    before = network[1].weight.detach().clone()
    editor = KFACEditor(network, found, EditConfig(rho=0.5))
    for _ in range(2):
        editor.apply()
        assert not torch.equal(network[1].weight[:4], before[:4]) and not torch.equal(network[1].weight[4:], before[4:])
        editor.restore()
        assert torch.equal(network[1].weight, before)


def test_a_layer_that_never_runs_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3, 2)
            self.idle = nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    batches = [{"x": torch.ones(2, 3)}]
    with pytest.raises(InputError, match="idle was never run; leave it out"):
        collect_factors(Idle(), batches, modules=[".*"], loss_fn=lambda model, batch: model(batch["x"]).sum())
    model = build_model("olmo2")
    model.model.idle = nn.Linear(24, 24)
    with pytest.raises(InputError, match=r"model\.idle is among them, which text never runs through"):
        collect_factors(model, [{"input_ids": torch.ones(1, 5, dtype=torch.long)}], modules=[r"model\.idle"])
