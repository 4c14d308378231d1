"""What tests of attention share."""

import numpy as np
import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.attention import Crystallization, crystallize
from tests.common import VOCAB

LAYERS = [1, 2]


def calibration(rows=6, length=20, seed=3):
    return {"input_ids": torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))}


def everywhere(*setting, layers=LAYERS):
    return dict.fromkeys(layers, Crystallization(*setting))


def refuse(model, settings, message, spectra=None):
    with pytest.raises(InputError, match=message), crystallize(model, settings, spectra):
        pass


def noisy(*means, rows=400, noise=0.3):
    """Losses of rows of 10 targets, alike for all models but for the mean and a little noise."""
    rng = np.random.default_rng(1)
    shared = rng.normal(3, 0.5, rows)
    return [10 * (shared + mean + rng.normal(0, noise, rows)) for mean in means], np.full(rows, 10)
