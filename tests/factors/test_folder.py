"""Factors on the disk."""

import pytest
import torch

from lightning_kfac import InputError, collect_factors, load_factors, save_factors
from tests.common import batched, build_model


def test_factors_survive_the_disk(tmp_path, rows):
    model = build_model("llama")
    factors = collect_factors(model, batched(rows, 3))
    save_factors(factors, tmp_path / "factors", {"model": "small"})
    loaded = load_factors(tmp_path / "factors")
    assert list(loaded) == list(factors) and loaded.metadata["model"] == "small"
    for name, expected in factors.items():
        found = loaded[name]
        assert torch.equal(found.A, expected.A) and torch.equal(found.G, expected.G)
        assert found.n_tokens == expected.n_tokens
    # gate and up share one A; only triangles are stored
    assert loaded.shared_A("model.layers.0.mlp.gate_proj") == loaded.shared_A("model.layers.0.mlp.up_proj")
    size = sum(f.stat().st_size for f in (tmp_path / "factors").glob("*.safetensors"))
    triangles = 3 * (24 * 25 // 2 + 40 * 41 // 2 + 2 * 40 * 41 // 2 + 24 * 25 // 2)
    assert size < 4 * triangles + 9 * 300
    assert not list(tmp_path.glob("*.part"))


def test_wrong_factor_folders(tmp_path, rows):
    with pytest.raises(InputError, match="not a factor folder"):
        load_factors(tmp_path)
    factors = collect_factors(build_model("olmo2"), batched(rows, 3), blocks=[0], projections=["up"])
    save_factors(factors, tmp_path / "f")
    (tmp_path / "f" / "layer_0000.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match=r"layer_0000\.safetensors: damaged or incomplete: .*; collect"):
        load_factors(tmp_path / "f")["model.layers.0.mlp.up_proj"]
    (tmp_path / "f" / "metadata.json").write_text("{")
    with pytest.raises(InputError, match=r"metadata\.json: damaged or incomplete: "):
        load_factors(tmp_path / "f")
    (tmp_path / "f" / "metadata.json").write_text('{"format": 99, "layers": {}}')
    with pytest.raises(InputError, match="factor format 99"):
        load_factors(tmp_path / "f")
