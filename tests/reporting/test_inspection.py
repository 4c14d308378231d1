"""Spectra and band profiles against loops over components and tokens, and the commands that show them."""

import json
import math
import os

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac import EditConfig, collect_factors, save_factors
from lightning_kfac.callbacks.spectrum import _cuts
from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.evaluation.excitation import excitation, layer_forms
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.spectra import CURVE, by_projection, layer_spectrum
from lightning_kfac.math.bands import band_forms, band_masks, band_ratios, band_shares, energies
from lightning_kfac.math.spectrum import effective_rank
from lightning_kfac.models.layers import find_layers
from lightning_kfac.reporting.spectra_board import write_spectra
from tests.common import VOCAB, build_model, write_jsonl


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def descending(n, seed):
    return torch.rand(n, generator=generator(seed), dtype=torch.float64).sort(descending=True).values


# -- spectra -----------------------------------------------------------------------------------------------------


def test_curve_is_a_loop_over_sorted_products():
    lambdas, mu = descending(7, 0), descending(5, 1)
    spectrum = layer_spectrum(lambdas, mu, rho=0.6)
    products = sorted((a * b for a in lambdas.tolist() for b in mu.tolist()), reverse=True)
    total = sum(products)
    for kept, mass in zip(*spectrum.curve, strict=True):
        count, held = 0, 0.0
        while held < mass * total * (1 - 1e-12):
            held += products[count]
            count += 1
        assert kept == count / 35
    count = round(spectrum.fraction_kept * 35)
    assert sum(products[:count]) >= 0.6 * total > sum(products[: count - 1])
    assert spectrum.rank_A == pytest.approx(effective_rank(mu)) and spectrum.condition_A == (mu[0] / mu[-1]).item()
    assert tuple(spectrum.curve[1]) == CURVE


def test_spectrum_of_nothing():
    spectrum = layer_spectrum(torch.zeros(3), torch.zeros(2), rho=0.5)
    assert spectrum.fraction_kept == 0 and spectrum.numbers()["condition_A"] is None
    assert set(spectrum.curve[0]) == {0.0}


def test_layers_by_projection_and_depth():
    spectrum = layer_spectrum(descending(3, 0), descending(2, 1))
    names = ["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.gate_proj"]
    groups = by_projection(dict.fromkeys(names, spectrum))
    assert {name: list(blocks) for name, blocks in groups.items()} == {"up": [2, 10], "gate": [2]}
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(3)]
    groups = by_projection(dict.fromkeys(experts, spectrum))
    assert {name: list(blocks) for name, blocks in groups.items()} == {"up": [0], experts[1]: [0], experts[2]: [0]}


def test_the_page_of_a_large_layer_is_small(tmp_path):
    """The eigenvalues of a 7B layer: below 1 MB."""
    lambdas, mu = (torch.arange(1, n + 1, dtype=torch.float64) ** -0.7 for n in (11008, 4096))
    name = "model.layers.3.mlp.up_proj"
    with SummaryWriter(str(tmp_path)) as writer:
        write_spectra(writer, {name: layer_spectrum(lambdas, mu, 0.6)})
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 1_000_000
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"spectra/up eigenvalues", "spectra/up mass", "kept/3 up"}
    assert set(events.Tags()["histograms"]) == {"log10 eigenvalues/3 up A", "log10 eigenvalues/3 up G"}


# -- bands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bands", [1, 4, 10])
def test_bands_are_of_equal_count_and_in_order(n_bands):
    importance = torch.rand(9, 7, generator=generator(), dtype=torch.float64).round(decimals=1)  # with ties
    masks = band_masks(importance, n_bands)
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(9, 7, dtype=torch.long))
    order = sorted(range(63), key=lambda k: (-importance.flatten()[k].item(), k))
    for number, mask in enumerate(masks):
        expected = order[round(63 * number / n_bands) : round(63 * (number + 1) / n_bands)]
        assert mask.flatten().nonzero().flatten().tolist() == sorted(expected)


def test_energies_are_a_loop_over_tokens():
    d_out, d_in, n = 9, 7, 20
    W, X = (
        torch.randn(*s, generator=generator(i), dtype=torch.float64) for i, s in enumerate([(d_out, d_in), (n, d_in)])
    )
    U_G, U_A = (
        torch.linalg.qr(torch.randn(d, d, generator=generator(d), dtype=torch.float64))[0] for d in (d_out, d_in)
    )
    C, masks = U_G.T @ W @ U_A, band_masks(torch.outer(descending(d_out, 2), descending(d_in, 3)), 4)
    found = energies(band_forms(C, U_A, masks), X.T @ X)
    expected = [sum(((U_G @ (C * mask) @ U_A.T) @ x).square().sum().item() for x in X) for mask in masks]
    expected.append(sum((W @ x).square().sum().item() for x in X))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # the forms are float32


def test_shares_and_ratios_with_intervals():
    rng = np.random.default_rng(0)
    shards, others = rng.uniform(1, 2, (24, 4)), rng.uniform(2, 3, (16, 4))
    counts, other_counts = np.full(24, 10), rng.integers(5, 20, 16)
    shares = band_shares(shards)
    assert shares.value == pytest.approx(np.sqrt(shards.sum(0)[:3] / shards.sum(0)[3]), rel=1e-12)
    ratios = band_ratios(shards, counts, others, other_counts)
    per_input = shards.sum(0)[:3] / 240, others.sum(0)[:3] / other_counts.sum()
    assert ratios.value == pytest.approx(np.sqrt(per_input[0] / per_input[1]), rel=1e-12)
    for bands in (shares, ratios):
        assert (bands.low < bands.value).all() and (bands.value < bands.high).all()
    # A bootstrap by hand, with other draws.
    draws = []
    for _ in range(3000):
        a, b = rng.integers(0, 24, 24), rng.integers(0, 16, 16)
        x, y = shards[a, 0].sum() / counts[a].sum(), others[b, 0].sum() / other_counts[b].sum()
        draws.append(math.sqrt(x / y))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (ratios.low[0], ratios.high[0]) == tuple(pytest.approx(v, abs=0.08 * (high - low)) for v in (low, high))


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
        (only,) = layer_forms(model, {name: factors[name]}, BasisCache(), 1)[name][:1]
        x = torch.cat(rows[:3])
        assert energies(only[None], x.T @ x).item() == pytest.approx(sum(whole[:3]), rel=1e-5)
    for name in factors:
        model.get_submodule(name)._forward_pre_hooks.clear()


# -- commands -------------------------------------------------------------------------------------------------------


def test_layers_without_a_block(tmp_path):
    """The output layer has neither block nor projection, and the decoder alone does not run it."""
    ids = torch.arange(1, 513).view(8, 64)
    modules = ["lm_head", r".*layers\.2.*up_proj"]
    factors = collect_factors(build_model("llama"), [{"input_ids": ids % VOCAB}], modules=modules)
    save_factors(factors, tmp_path / "f", {"model": "none", "n_tokens": 1})
    edit_main(["inspect", "--factors", str(tmp_path / "f"), "--output", str(tmp_path / "i")])
    assert (tmp_path / "i" / "kept_lm_head.png").exists()
    model = build_model("llama")
    forms = layer_forms(model, factors, BasisCache.beside(factors), 3)
    found = excitation(model, factors, forms, [[{"input_ids": ids % VOCAB}]])
    assert (found["lm_head"].energies > 0).all()


@pytest.mark.parametrize(("formula", "shown"), [("original", True), ("modified", False)])
def test_figures_show_the_cut_of_this_edit_only(formula, shown):
    names = [f"model.layers.{block}.mlp.up_proj" for block in (1, 2, 3)]
    edit = EditConfig(rho=0.7, formula=formula, blocks=[1, 2])
    cuts = _cuts(edit, names, 4)
    assert cuts == ({names[0]: 0.7, names[1]: 0.7} if shown else {})


def test_inspect_writes_figures(demo_factors, tmp_path, capsys):
    words = ["--factors", str(demo_factors), "--rhos", "[0.6, 0.8]", "--output", str(tmp_path / "i")]
    edit_main(["inspect", *words])
    names = {p.name for p in (tmp_path / "i").iterdir()}
    assert {"spectra.json", "kept_3_gate.png", "spectra_up_mass.png", "tensorboard"} <= names
    numbers = json.loads((tmp_path / "i" / "spectra.json").read_text())
    assert set(numbers) == {"model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"}
    with pytest.raises(SystemExit):
        edit_main(["inspect", *words])
    assert "add --overwrite to replace it" in capsys.readouterr().err


def test_bands_of_the_demo(demo_factors, tmp_path, capsys):
    words = ["--factors", str(demo_factors), "--texts.memorized", "demo:planted_report.jsonl"]
    words += ["--texts.general", "embedded", "--max_tokens", "4000", "--output", str(tmp_path / "b")]
    edit_main(["bands", *words, "--shards", "16"])
    result = json.loads((tmp_path / "b" / "bands.json").read_text())
    assert result["against"] == "general" and result["n_positions"]["memorized"] == 100 * 111
    layer = result["layers"]["model.layers.3.mlp.up_proj"]
    assert len(layer["memorized"]["ratio"]["value"]) == 10 and "ratio" not in layer["general"]
    shown = capsys.readouterr().out
    assert "3 up" in shown and "the paper averages norms instead" in shown
    assert {"bands_3_up.png", "ratios_memorized.png"} <= set(os.listdir(tmp_path / "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--texts is missing"),
        ({"texts.a": "embedded", "against": "b"}, "--against b: no such text; there are a"),
        ({"texts.a": "embedded", "shards": 3}, "--shards must be at least 16"),
        ({"texts.a": "few"}, "2 rows, fewer than --shards 32"),
        ({"texts.a/b": "embedded"}, "the name 'a/b' may hold letters"),
    ],
)
def test_wrong_bands(demo_factors, tmp_path, capsys, changes, message):
    row = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    few = write_jsonl(tmp_path / "few.jsonl", [row, {**row, "suffix_ids": [4]}])
    changes = {name: few if value == "few" else value for name, value in changes.items()}
    words = ["--factors", str(demo_factors), "--output", str(tmp_path / "b")]
    with pytest.raises(SystemExit):
        edit_main(["bands", *words, *(part for n, v in changes.items() for part in (f"--{n}", str(v)))])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()
