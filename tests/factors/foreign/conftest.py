"""What tests of other tools' files share."""

import pytest
import torch

from lightning_kfac import KroneckerFactors
from tests.factors.foreign.common import LAYERS, N, moment


@pytest.fixture
def samples():
    """Inputs [N, 6] that gate and up share, output gradients [N, 5] of each."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(N, 6, generator=generator)
    return a, {projection: torch.randn(N, 5, generator=generator) for projection in LAYERS}


@pytest.fixture
def expected(samples):
    """The factors of these samples by layer."""
    a, gradients = samples
    a = a.double()
    return {
        LAYERS[p]: KroneckerFactors((moment(a) / N).float(), (moment(g.double()) / N).float(), N)
        for p, g in gradients.items()
    }
