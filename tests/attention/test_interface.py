"""Attention is put back as it was, and what cannot be transformed is refused."""

import pytest
import torch
from transformers import AutoConfig

from lightning_kfac import InputError
from lightning_kfac.attention import Crystallization, collect_residuals, crystallize
from lightning_kfac.models.loading import skeleton
from tests.attention.common import calibration, everywhere, refuse
from tests.common import VOCAB, build_model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_put_back(implementation):
    model = build_model("llama")
    model.set_attn_implementation(implementation)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    untouched = model(**calibration()).logits
    for error in (None, RuntimeError("inside")):
        try:
            with crystallize(model, everywhere("top1")):
                model(**calibration())
                if error:
                    raise error
        except RuntimeError as caught:
            assert caught is error
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(**calibration()).logits, untouched)
        assert before == {name: set(vars(module)) for name, module in model.named_modules()}
        assert forwards == {name: module.forward.__func__ for name, module in model.named_modules()}


def test_two_models_do_not_mix():
    first, second = build_model("llama"), build_model("llama", num_hidden_layers=2)
    alone = second(**calibration()).logits
    with crystallize(first, everywhere("top1")):
        assert torch.equal(second(**calibration()).logits, alone)
        with crystallize(second, {1: Crystallization("full")}):
            assert (second(**calibration()).logits - alone).abs().max() < 1e-5
        inside = first(**calibration()).logits
    with crystallize(first, everywhere("top1")):
        assert torch.equal(first(**calibration()).logits, inside)


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_an_architecture_without_the_interface_is_refused(family):
    settings = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "n_layer": 2, "n_head": 2}
    model = skeleton(AutoConfig.for_model(family, **settings))
    refuse(model, everywhere("top1"), "does not use the attention interface")
    with pytest.raises(InputError, match="does not use the attention interface"):
        collect_residuals(model, [], [0])
