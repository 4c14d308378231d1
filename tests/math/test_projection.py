"""Weights from kept components against the sum of these components."""

import torch

from lightning_kfac.math.projection import suppress
from tests.common import generator


def test_suppress_is_the_sum_of_kept_components():
    W = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    U_G, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator(1), dtype=torch.float64))
    U_A, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator(2), dtype=torch.float64))
    keep = torch.rand(4, 3, generator=generator(3)) > 0.4
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for j in range(3):
            if keep[i, j]:
                expected += (U_G[:, i] @ W @ U_A[:, j]) * torch.outer(U_G[:, i], U_A[:, j])
    assert torch.allclose(suppress(U_G.T @ W @ U_A, keep, U_G, U_A), expected, atol=1e-14)
