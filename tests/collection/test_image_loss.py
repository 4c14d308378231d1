"""Factors of a vision transformer against plain autograd: one image at a time, one position at a time, in float64."""

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from lightning_kfac import InputError
from lightning_kfac.collection.image_loss import ImageBatch, ImageLoss
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.math.loss import IGNORED, sample_labels, uniforms
from lightning_kfac.models.targets import resolve_targets
from tests.common import relative_error

SHAPE, CLASSES, POSITIONS, IMAGES = (1, 8, 8), 5, 5, 7


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    settings = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2}
    model = ViTForImageClassification(
        ViTConfig(**settings, num_attention_heads=2, intermediate_size=24, num_labels=CLASSES)
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(IMAGES, *SHAPE, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    return pixels, labels


def expected(model, pixels, labels, positions):
    """A and G of every up and down projection, and the number of positions that count."""
    model = type(model)(model.config).double().eval()
    model.load_state_dict(ORIGINAL[0])
    names = [name for name, _ in model.named_modules() if name.endswith((".fc1", ".fc2"))]
    sums, count = {}, 0
    counted = range(1) if positions == "class" else range(POSITIONS)
    for image, label in zip(pixels.double(), labels, strict=True):
        seen = {}

        def remember(layer, args, output, seen=seen):
            output.retain_grad()
            seen[layer] = args[0].detach()[0], output

        layers = {name: model.get_submodule(name) for name in names}
        handles = [layer.register_forward_hook(remember) for layer in layers.values()]
        F.cross_entropy(model(pixel_values=image[None]).logits, label[None]).backward()
        for handle in handles:
            handle.remove()
        for t in counted:
            count += 1
            for name, layer in layers.items():
                a, output = seen[layer]
                A, G = sums.get(name, (0, 0))
                g = output.grad[0, t]
                sums[name] = A + torch.outer(a[t], a[t]), G + torch.outer(g, g)
    return {name: (A / count, G / count) for name, (A, G) in sums.items()}, count


ORIGINAL = []


@pytest.fixture(autouse=True)
def weights(vit):
    ORIGINAL[:] = [{name: value.double() for name, value in vit.state_dict().items()}]


def collected(model, pixels, labels, objective, batch_size=3):
    session = CollectionSession(model, resolve_targets(model, "all", ["up", "down"]), objective)
    session.make_plan((batch_size, POSITIONS))
    session.open(session.plan.passes[0])
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        index = torch.arange(len(pixels))[part]
        batch = ImageBatch(pixels[part], labels[part], labels[part], index, POSITIONS, objective.positions)
        session.run(batch).backward()
    return session.close()


@pytest.mark.parametrize("positions", ["class", "all"])
@pytest.mark.parametrize("batch_size", [3, 7])
def test_factors_against_autograd(vit, images, positions, batch_size):
    pixels, labels = images
    found = collected(vit, pixels, labels, ImageLoss(SHAPE, CLASSES, positions, "gold"), batch_size)
    oracle, count = expected(vit, pixels, labels, positions)
    assert set(found) == set(oracle) and len(oracle) == 4
    for name, (A, G) in oracle.items():
        assert found[name].n_tokens == count == IMAGES * (1 if positions == "class" else POSITIONS)
        assert relative_error(found[name].A, A) < 2e-6 and relative_error(found[name].G, G) < 1e-5, name


def test_patches_of_the_last_block_have_no_gradient(vit, images):
    """The classifier reads the class token alone: the last block's G is the class token's, over more positions."""
    alone = collected(vit, *images, ImageLoss(SHAPE, CLASSES, "class", "gold"))
    every = collected(vit, *images, ImageLoss(SHAPE, CLASSES, "all", "gold"))
    last, first = (f"vit.layers.{block}.mlp.fc1" for block in (1, 0))
    assert relative_error(every[last].G * POSITIONS, alone[last].G) < 1e-6
    assert relative_error(every[first].G * POSITIONS, alone[first].G) > 0.01


def test_labels_are_drawn_from_the_predictions_for_each_image(vit, images):
    pixels, labels = images
    found = collected(vit, pixels, labels, ImageLoss(SHAPE, CLASSES, "class", "sampled", seed=4))
    u = uniforms(4, torch.arange(IMAGES), torch.zeros(IMAGES, 1, dtype=torch.long))[:, 0]
    drawn = sample_labels(vit(pixel_values=pixels).logits, u)
    assert not torch.equal(drawn, labels)
    oracle, _ = expected(vit, pixels, drawn, "class")
    assert all(relative_error(found[name].G, G) < 1e-5 for name, (_, G) in oracle.items())


def test_fillers_count_nowhere(vit, images):
    """Where ranks have unequally many images."""
    pixels, labels = images
    objective = ImageLoss(SHAPE, CLASSES, "all", "sampled")
    filled = labels.clone()
    filled[5:] = IGNORED
    found = collected(vit, pixels, filled, objective, batch_size=7)
    fewer = collected(vit, pixels[:5], labels[:5], objective, batch_size=5)
    for name, factors in fewer.items():
        assert found[name].n_tokens == factors.n_tokens == 25
        assert relative_error(found[name].A, factors.A) < 1e-6 and relative_error(found[name].G, factors.G) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "patches"}, "positions is 'patches'; choose class or all"),
        ({"labels": "true"}, "labels is 'true'"),
        ({"labels": "gold", "mc_samples": 2}, "mc_samples is 2"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ImageLoss(SHAPE, CLASSES, **settings)
