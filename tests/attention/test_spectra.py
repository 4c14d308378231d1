"""Dimensions of spectra."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.attention import HeadSpectra, ResidualSpectra
from lightning_kfac.attention.spectra import cumulative_ratio, effective_dimension


def test_effective_dimension():
    variances = torch.tensor([[5.0, 4.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert effective_dimension(variances).tolist() == [2, 3, 1]
    assert cumulative_ratio(variances)[2].tolist() == [1, 1, 1]


def test_damaged_residuals_are_named():
    spectra = ResidualSpectra({0: HeadSpectra(torch.full((1, 2, 2), torch.nan), torch.zeros(1), torch.zeros(1))})
    with pytest.raises(InputError, match="residuals of head 0 has NaN"):
        spectra[0].effective_dimension()
