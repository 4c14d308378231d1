"""What a study says in words."""

import pytest
import torch

from lightning_kfac.attention import HeadSpectra, ResidualSpectra
from lightning_kfac.attention.comparison import compare, lowrank
from lightning_kfac.attention.study import Study
from tests.attention.common import noisy


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ((0.5, 0.4, 0.02), ["layer 5 raises", "is partly compressible: rank 16 of 32", "9.0 of 32", "of 9 memorized"]),
        ((0.5, 0.01, 0.02), ["is compressible: rank 4 of 32 is the smallest", "(interval 4 to 4), and recovers 98 %"]),
        ((0.5, 0.4, 0.3), ["No rank that was tried recovers 90 % of the loss; rank 16 recovers"]),
        ((0.0, 0.0, 0.0), ["hardly changes", "There is no loss beyond its own interval"]),
        ((-0.5, 0.0, 0.0), ["lowers", "There is no loss beyond its own interval"]),
    ],
)
def test_verdicts(means, told):
    losses, counts = noisy(0, *means, 0.1, noise=0.01)
    names = ["baseline", "top1", lowrank(4), lowrank(16), "layer 5 head 0"]
    found = compare(dict(zip(names, losses, strict=True)), counts, [4, 16])
    # Nine equal directions hold the variance: nine are needed for 90 %.
    moments = torch.diag(torch.arange(32) < 9).double()[None]
    spectra = ResidualSpectra({5: HeadSpectra(moments, torch.zeros(1), torch.ones(1))})
    study = Study(found, spectra, {"baseline": (1.0, 9), "top1": (1 / 3, 9)})
    assert all(text.lower() in study.verdict().lower() for text in told), study.verdict()
    assert "recites 3 (9 unchanged)" in study.verdict()
