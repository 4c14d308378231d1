"""Collected residuals against those of the oracle, stacked."""

import pytest
import torch
from torch.nn import functional as F

from lightning_kfac import InputError
from lightning_kfac.attention import collect_residuals
from tests.attention.common import LAYERS, calibration
from tests.attention.oracle import AttentionOracle
from tests.common import batched, build_model


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


def test_nothing_collected_and_nan_are_named():
    model = build_model("llama")
    with pytest.raises(InputError, match="layer 1: the attention residuals were not collected"):
        collect_residuals(model, [], [1])
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer 1: the attention residuals have NaN"):
        collect_residuals(model, [calibration()], [1])
