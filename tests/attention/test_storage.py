"""Spectra on the disk."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.attention import collect_residuals, load_spectra, save_spectra
from tests.attention.common import calibration
from tests.common import build_model


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
