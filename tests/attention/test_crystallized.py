"""Crystallized attention against explicit sums in float64: decomposition, spectra, modes, and what is put back."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import InputError
from lightning_kfac.attention import (
    Crystallization,
    HeadSpectra,
    ResidualSpectra,
    collect_residuals,
    crystallize,
    load_spectra,
    save_spectra,
)
from lightning_kfac.attention.decomposition import decompose, ground_state, project, sharpness
from lightning_kfac.attention.interface import attention_shapes
from lightning_kfac.attention.spectra import cumulative_ratio, effective_dimension
from lightning_kfac.models.loading import skeleton
from tests.attention_oracle import AttentionOracle
from tests.common import COMMON, VOCAB, batched, build_model

LAYERS = [1, 2]
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def spectra(any_model):
    return collect_residuals(any_model, [calibration()], LAYERS)


def calibration(rows=6, length=20, seed=3):
    return {"input_ids": torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))}


def everywhere(*setting, layers=LAYERS):
    return dict.fromkeys(layers, Crystallization(*setting))


def modes(width):
    return [("top1",), ("full",), *(("lowrank", r) for r in (0, 1, 3, width))]


# -- pure functions ---------------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_index():
    p = torch.tensor([[[[0.1, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]]]])
    values = torch.arange(4.0).view(1, 1, 4, 1)
    assert ground_state(p, values).flatten().tolist() == [1, 0]
    assert ground_state(torch.full((1, 1, 1, 1000), 1e-3), torch.arange(1000.0).view(1, 1, 1000, 1)).item() == 0


def test_decomposition_is_exact_and_shares_grouped_values():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 4, 3, 5, generator=generator).softmax(-1)
    values = torch.randn(2, 2, 5, 6, generator=generator)
    output = torch.einsum("bhts,bhsd->bthd", p, values[:, [0, 0, 1, 1]])
    ground, residual = decompose(output, p, values)
    assert torch.allclose(ground + residual, output, atol=1e-7)
    for b, t, h in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        assert torch.equal(ground[b, t, h], values[b, h // 2, p[b, h, t].argmax()])


def test_projection_and_sharpness():
    residual = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    directions = torch.eye(4).expand(2, 4, 4)
    assert torch.equal(project(residual, directions[..., :0]), torch.zeros_like(residual))
    assert torch.equal(project(residual, directions[..., :3])[..., 3], torch.zeros(3, 2))
    assert torch.allclose(project(residual, directions), residual)
    entropy, mass = sharpness(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.bfloat16))
    assert torch.allclose(entropy, torch.tensor([0, 0.5]).new_tensor([0, torch.log(torch.tensor(2.0))]))
    assert mass.tolist() == [1, 0.5] and mass.dtype == torch.float32


def test_effective_dimension():
    variances = torch.tensor([[5.0, 4.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert effective_dimension(variances).tolist() == [2, 3, 1]
    assert cumulative_ratio(variances)[2].tolist() == [1, 1, 1]


# -- spectra ----------------------------------------------------------------------------------------------------


def test_streaming_spectra_are_those_of_the_stacked_residuals(any_model, rows):
    oracle = AttentionOracle(any_model)
    whole = {layer: [oracle.split(layer, row)[1][:-1] for row in rows] for layer in LAYERS}
    found = collect_residuals(any_model, batched(rows, 3), LAYERS)
    assert found.metadata["n_tokens"] == sum(len(row) - 1 for row in rows)
    for layer in LAYERS:
        stacked = torch.cat(whole[layer])  # [N, H, d]
        for h in range(stacked.shape[1]):
            _, values, vectors = torch.linalg.svd(stacked[:, h], full_matrices=False)
            variances = values**2 / len(stacked)
            head = found[layer].variances[h][: len(values)]
            assert (head - variances).norm() <= 1e-5 * variances.norm()
            rebuilt = found[layer].directions(99)[h] * found[layer].variances[h] @ found[layer].directions(99)[h].T
            assert (rebuilt - (vectors.T * variances) @ vectors).norm() <= 1e-5 * variances.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_no_spectrum(any_model, rows, side):
    alone = collect_residuals(any_model, ({"input_ids": torch.tensor([row])} for row in rows), [1])
    padded = collect_residuals(any_model, batched(rows, 4, side), [1])
    for name in ("second_moment", "entropy", "top1_mass"):
        a, b = getattr(alone[1], name), getattr(padded[1], name)
        assert a.dtype == torch.float64 and (a - b).norm() <= 1e-5 * a.norm()


def test_sharpness_of_a_layer(rows):
    model = build_model("qwen3")
    oracle = AttentionOracle(model)
    each = [oracle.layer(1, row, {})[0][:, :-1] for row in rows]
    p = torch.cat([F.pad(row, (0, 12 - row.shape[-1])) for row in each], dim=1)
    found = collect_residuals(model, batched(rows, 7), [1])[1]
    assert torch.allclose(found.top1_mass, p.amax(-1).mean(-1), atol=1e-6)
    assert torch.allclose(found.entropy, torch.special.entr(p).sum(-1).mean(-1), atol=1e-6)


def test_spectra_survive_the_disk(tmp_path):
    model = build_model("gpt2")
    spectra = collect_residuals(model, [calibration()], [-1])
    save_spectra(spectra, tmp_path / "residuals")
    loaded = load_spectra(tmp_path / "residuals")
    assert list(loaded) == [2] and torch.equal(loaded[2].second_moment, spectra[2].second_moment)
    loaded.check_model(model)
    (tmp_path / "residuals" / "layer_0002.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match="damaged"):
        load_spectra(tmp_path / "residuals")
    with pytest.raises(InputError, match="not a folder of residual spectra"):
        load_spectra(tmp_path)


# -- modes ------------------------------------------------------------------------------------------------------


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


# -- what is put back -------------------------------------------------------------------------------------------


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


# -- wrong input ------------------------------------------------------------------------------------------------


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


def refuse(model, settings, message, spectra=None):
    with pytest.raises(InputError, match=message), crystallize(model, settings, spectra):
        pass


def test_a_basis_of_another_model_is_refused(llama):
    spectra = collect_residuals(llama, [calibration()], LAYERS)
    other = build_model("llama")
    other.lm_head.weight.data += 1
    refuse(other, everywhere("lowrank", 1), "collected on other weights", spectra)
    refuse(llama, everywhere("lowrank", 1), "needs residual spectra")


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_an_architecture_without_the_interface_is_refused(family):
    settings = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "n_layer": 2, "n_head": 2}
    model = skeleton(AutoConfig.for_model(family, **settings))
    refuse(model, everywhere("top1"), "does not use the attention interface")
    with pytest.raises(InputError, match="does not use the attention interface"):
        collect_residuals(model, [], [0])


def test_nothing_collected_and_nan_are_named():
    model = build_model("llama")
    with pytest.raises(InputError, match="layer 1: the attention residuals were not collected"):
        collect_residuals(model, [], [1])
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 1: the attention residuals have NaN"):
        collect_residuals(model, [calibration()], [1])


def test_damaged_residuals_are_named():
    spectra = ResidualSpectra({0: HeadSpectra(torch.full((1, 2, 2), torch.nan), torch.zeros(1), torch.zeros(1))})
    with pytest.raises(InputError, match="residuals of head 0 has NaN"):
        spectra[0].effective_dimension()
