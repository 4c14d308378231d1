"""Bulk shares of texts against hooks on one text at a time, in float64."""

from dataclasses import replace

import pytest
import torch

from lightning_kfac import collect_factors, load_factors, save_factors
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation import leaks
from lightning_kfac.evaluation.bulk import BulkShare, check_layers
from lightning_kfac.evaluation.leaks import text_scores
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.factors.moments import save_moments
from lightning_kfac.math.bulk import bulk_share, flattest, random_basis
from tests.common import build_model, generator, sequences

PROJECTIONS = {"olmo2": ("gate", "up", "down"), "gpt2": ("up", "down")}


@pytest.fixture(scope="module", params=list(PROJECTIONS))
def material(request):
    model = build_model(request.param, torch.float64)
    batch = {"input_ids": torch.randint(1, 61, (8, 16), generator=generator(4))}
    return model, collect_factors(model, [batch], projections=PROJECTIONS[request.param], blocks=[0, 2])


def by_hand(model, factors, prefix, suffix):
    """Shares of one text: layer to that in the layer's basis and in a random one."""
    seen = {}

    def remember(name):
        def hook(module, args, output):
            seen[name] = args[0].detach()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in factors]
    with torch.no_grad():
        model(input_ids=torch.tensor([[*prefix, *suffix]]))
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in factors.items():
        a = seen[name][0, len(prefix) - 1 : -1]
        weight = model.get_submodule(name).weight.detach()
        W = weight.T if model.config.model_type == "gpt2" else weight
        values, vectors = torch.linalg.eigh(layer.A.double())
        order = values.argsort(descending=True)
        own = bulk_share(a, W, vectors[:, order], flattest(values[order].clamp(min=0)))
        size = len(values)
        first = torch.arange(size) < round(0.6 * size)
        found[name] = own, bulk_share(a, W, random_basis(size), first)
    return found


def test_shares_are_those_of_each_text_alone(material, monkeypatch):
    model, factors = material
    prefixes, suffixes = sequences(model, 7)
    bulk = BulkShare(model, factors)
    plain = text_scores(model, prefixes, suffixes)
    for most in (30, leaks.TOKENS_AT_ONCE):
        monkeypatch.setattr(leaks, "TOKENS_AT_ONCE", most)
        found = text_scores(model, prefixes, suffixes, bulk=bulk)
        for score, other, prefix, suffix in zip(found, plain, prefixes, suffixes, strict=True):
            expected = by_hand(model, factors, prefix, suffix)
            assert set(score) - set(other) == {
                "bulk_share", "bulk_share_random", *factors, *(f"random:{name}" for name in factors)
            }  # fmt: skip
            for name, (own, random) in expected.items():
                assert score[name] == pytest.approx(own, rel=1e-5)  # the factors are float32
                assert score[f"random:{name}"] == pytest.approx(random, rel=1e-9)
            assert score["bulk_share"] == pytest.approx(
                sum(own for own, _ in expected.values()) / len(expected), rel=1e-5
            )
            assert {name: score[name] for name in other} == pytest.approx(other, rel=1e-9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_whose_logits_are_computed_in_parts(material, monkeypatch):
    """Rows one at a time, as where a model takes no mask, and few rows at a time, where its head is not plain."""
    model, factors = material
    prefixes, suffixes = sequences(model, 5)
    expected = text_scores(model, prefixes, suffixes, bulk=BulkShare(model, factors))
    own = leaks.manner_of(model)
    for patch in (
        lambda: monkeypatch.setattr("lightning_kfac.models.logits.manner_of", lambda _: replace(own, apart_from=0)),
        lambda: monkeypatch.setattr("lightning_kfac.models.logits.is_plain_head", lambda _: False),
    ):
        with monkeypatch.context():
            patch()
            monkeypatch.setattr("lightning_kfac.models.logits.LOGITS_AT_ONCE", 61 * 60)
            for one, other in zip(
                text_scores(model, prefixes, suffixes, bulk=BulkShare(model, factors)), expected, strict=True
            ):
                assert one == pytest.approx(other, rel=1e-9)


def test_measured_moments_say_which_directions_are_flat(tmp_path):
    model = build_model("olmo2", torch.float64)
    name = "model.layers.1.mlp.up_proj"
    batch = {"input_ids": torch.randint(1, 61, (8, 16), generator=generator(4))}
    save_factors(collect_factors(model, [batch], modules=[name]), tmp_path / "f", {"n_tokens": 120, "model": "m"})
    factors = load_factors(tmp_path / "f")
    bases = BasisCache.beside(factors)
    _, A = bases.of(factors, name)
    moments = torch.rand(40, 24, generator=generator(5))
    save_moments({name: moments}, factors.path, factors, bases, "token")
    row = torch.randint(1, 61, (12,), generator=generator(6)).tolist()
    seen = []
    with torch.no_grad():
        hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(input_ids=torch.tensor([row]))
        hook.remove()
    W = model.get_submodule(name).weight.detach()
    expected = bulk_share(seen[0][0, 4:-1], W, A.vectors, flattest(moments.double().sum(0)))
    (score,) = text_scores(model, [row[:5]], [row[5:]], bulk=BulkShare(model, factors))
    assert score["bulk_share"] == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(bulk_share(seen[0][0, 4:-1], W, A.vectors, flattest(A.values)), rel=1e-3)


def test_layers_that_cannot_be_listened_to():
    model = build_model("olmo2")
    good = KroneckerFactors(torch.eye(24), torch.eye(40), 10)
    with pytest.raises(InputError, match=r"the factors are of model\.layers\.9\.mlp\.up_proj, which the model"):
        check_layers(model, {"model.layers.9.mlp.up_proj": good})
    with pytest.raises(InputError, match=r"up_proj are of \(40, 23\), its weight is \(40, 24\)"):
        check_layers(model, {"model.layers.0.mlp.up_proj": KroneckerFactors(torch.eye(23), torch.eye(40), 10)})
    check_layers(model, {"model.layers.0.mlp.up_proj": good})
