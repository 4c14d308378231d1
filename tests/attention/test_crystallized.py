"""Crystallized attention against explicit sums in float64: modes, layers, heads, and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import InputError
from lightning_kfac.attention import Crystallization, collect_residuals, crystallize
from lightning_kfac.attention.interface import attention_shapes
from tests.attention.common import LAYERS, calibration, everywhere, refuse
from tests.attention.oracle import AttentionOracle
from tests.common import COMMON, batched, build_model

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def spectra(any_model):
    return collect_residuals(any_model, [calibration()], LAYERS)


def modes(width):
    return [("top1",), ("full",), *(("lowrank", r) for r in (0, 1, 3, width))]


@torch.no_grad()
def test_every_mode_against_the_oracle(any_model, spectra, rows):
    """Rows of different lengths, padded on either side, against one row at a time."""
    oracle, width = AttentionOracle(any_model), attention_shapes(any_model)[0][1]
    directions = {layer: spectra[layer].directions(width) for layer in LAYERS}
    rows = rows[1:4]
    for setting in modes(width):
        expected = [oracle.crystallized(row, LAYERS, *setting, directions=directions) for row in rows]
        for side in ("left", "right"):
            (batch,) = batched(rows, 3, side)
            mask = batch["attention_mask"]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            with crystallize(any_model, everywhere(*setting), spectra):
                logits = any_model(
                    input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
                ).logits
            for number, row in enumerate(expected):
                assert (logits[number][mask[number].bool()] - row).abs().max() < 1e-4, (setting, side)


@torch.no_grad()
def test_full_is_untouched_and_the_ends_of_lowrank(any_model, spectra):
    width = attention_shapes(any_model)[0][1]
    batch = calibration(seed=4)
    untouched = any_model(**batch).logits

    def logits(*setting):
        with crystallize(any_model, everywhere(*setting), spectra):
            return any_model(**batch).logits

    assert (logits("full") - untouched).abs().max() < 1e-5
    assert (logits("lowrank", width) - untouched).abs().max() < 1e-5
    assert torch.equal(logits("lowrank", 0), logits("top1"))
    assert (logits("top1") - untouched).abs().max() > 1e-2
    with crystallize(any_model, {}):  # nothing named: eager attention
        assert (any_model(**batch).logits - untouched).abs().max() < 1e-5


def incremental_error(model, ids, settings, spectra=None):
    """Largest difference of the logits of one forward and of decoding with a key-value cache."""
    with crystallize(model, settings, spectra):
        whole = model(ids).logits
        cache, steps = None, []
        for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
            output = model(part, past_key_values=cache, use_cache=True)
            cache, steps = output.past_key_values, [*steps, output.logits]
    return (torch.cat(steps, dim=1) - whole).abs().max()


@torch.no_grad()
def test_incremental_decoding_equals_the_full_forward(any_model, spectra):
    ids = calibration(2, 9, seed=5)["input_ids"]
    for setting in modes(4):
        assert incremental_error(any_model, ids, everywhere(*setting), spectra) < 1e-5, setting


@torch.no_grad()
def test_layers_and_heads_have_their_own_settings():
    model, batch = build_model("llama"), calibration()
    spectra = collect_residuals(model, [batch], LAYERS)
    settings = {1: Crystallization("lowrank", 2), -1: Crystallization("top1", heads=[0, 3])}
    with crystallize(model, settings, spectra):
        together = model(**batch).logits
        with crystallize(model, {0: Crystallization("full")}):  # inside another one: both hold
            assert torch.allclose(model(**batch).logits, together, atol=1e-5)
    with crystallize(model, {-1: Crystallization("top1", heads=[0, 1, 2, 3])}):
        every = model(**batch).logits
    with crystallize(model, {2: Crystallization("top1")}):
        assert torch.equal(model(**batch).logits, every)
    oracle, row = AttentionOracle(model), batch["input_ids"][0].tolist()
    first, eps = oracle.split(1, row)
    P = spectra[1].directions(2)
    replaced = {1: first + torch.einsum("thd,hdr,her->the", eps, P, P)}
    ground, eps = oracle.split(2, row, replaced)
    eps[:, [0, 3]] = 0
    assert (oracle.logits(row, replaced | {2: ground + eps}).logits[0] - together[0]).abs().max() < 1e-4


@torch.no_grad()
def test_bfloat16():
    model = build_model("qwen3", torch.bfloat16)
    batch = calibration()
    spectra = collect_residuals(model, [batch], LAYERS)
    exact = collect_residuals(build_model("qwen3"), [batch], LAYERS)
    assert (spectra[1].second_moment - exact[1].second_moment).norm() < 0.05 * exact[1].second_moment.norm()
    model.set_attn_implementation("eager")
    untouched = model(**batch).logits
    for setting in (("full",), ("lowrank", 8)):
        with crystallize(model, everywhere(*setting), spectra):
            logits = model(**batch).logits
            assert logits.dtype == torch.bfloat16
            assert (logits - untouched).float().norm() < 0.02 * untouched.float().norm()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
@torch.no_grad()
def test_soft_caps_sinks_and_sliding_windows_are_the_models_own(family):
    extra = {"gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1}, "gemma2": {"attn_logit_softcapping": 1.0}}
    settings = GROUPED | COMMON | {"sliding_window": 5} | extra.get(family, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    batch = calibration()
    untouched = model(**batch).logits
    with crystallize(model, everywhere("full", layers=[0, 1])):
        assert (model(**batch).logits - untouched).abs().max() < 1e-5
    with crystallize(model, everywhere("top1", layers=[0, 1])):
        assert (model(**batch).logits - untouched).abs().max() > 1e-6
    assert incremental_error(model, batch["input_ids"], everywhere("top1", layers=[0, 1])) < 1e-5


@pytest.fixture(scope="module")
def llama():
    return build_model("llama")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({7: Crystallization()}, "layer 7 does not exist; the model has attention in layers 0 to 2"),
        ({-4: Crystallization()}, "layer -4 does not exist"),
        ({1: Crystallization("lowrank", 7)}, "rank 7 is above 6, the width of a head in layer 1"),
        ({0: Crystallization("lowrank", 2)}, "the residual spectra have layers 1, 2, not layer 0"),
        ({1: Crystallization(heads=[4])}, "layer 1 has heads 0 to 3, no head 4"),
    ],
)
def test_wrong_settings(llama, settings, message):
    spectra = collect_residuals(llama, [calibration()], LAYERS)
    refuse(llama, settings, message, spectra)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hard",), "mode is 'hard'"),
        (("lowrank",), "needs a rank"),
        (("top1", 3), "take none"),
        (("lowrank", -1), "0 or"),
    ],
)
def test_wrong_crystallizations(arguments, message):
    with pytest.raises(InputError, match=message):
        Crystallization(*arguments)


def test_a_basis_of_another_model_is_refused(llama):
    spectra = collect_residuals(llama, [calibration()], LAYERS)
    other = build_model("llama")
    other.lm_head.weight.data += 1
    refuse(other, everywhere("lowrank", 1), "collected on other weights", spectra)
    refuse(llama, everywhere("lowrank", 1), "needs residual spectra")
