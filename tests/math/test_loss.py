"""Valid positions and sampled labels against loops over tokens."""

import numpy as np
import torch

from lightning_kfac.math.loss import sample_labels, uniforms, valid_positions
from tests.common import generator


def test_valid_positions():
    attend = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert valid_positions(attend).tolist() == [[True, True, False, False], [False, True, True, False]]
    labels = torch.tensor([[5, 5, -100, 5], [5, 5, 5, 5]])
    assert valid_positions(attend, labels)[0].tolist() == [True, False, False, False]


def test_uniforms_depend_on_sample_position_and_draw_only():
    index = torch.tensor([3, 8])
    position = torch.arange(6).repeat(2, 1)
    together = uniforms(7, index, position)
    assert together.dtype == torch.float64 and ((together >= 0) & (together < 1)).all()
    assert torch.equal(uniforms(7, index[1:], position[1:, :4])[0], together[1, :4])
    shifted = torch.tensor([[0, 0, 0, 1, 2, 3]])  # left padding
    assert torch.equal(uniforms(7, index[:1], shifted)[0, 2:], together[0, :4])
    for other in (uniforms(8, index, position), uniforms(7, index + 1, position), uniforms(7, index, position, draw=1)):
        assert not torch.isin(other, together).any()


def test_sampled_labels_invert_the_cumulative_distribution():
    logits = 3 * torch.randn(50, 13, generator=generator())
    u = torch.rand(50, generator=generator(1), dtype=torch.float64)
    expected = []
    for row, number in zip(logits.double().numpy(), u.tolist(), strict=True):
        cdf = np.cumsum(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        expected.append(next(k for k in range(13) if cdf[k] > number * cdf[-1]))
    assert sample_labels(logits, u).tolist() == expected
    assert sample_labels(logits, torch.zeros(50, dtype=torch.float64)).tolist() == [0] * 50
    # A class of probability zero is never drawn, whatever u.
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).repeat(1001, 1)
    drawn = sample_labels(logits, torch.linspace(0, 1 - 1e-16, 1001, dtype=torch.float64))
    assert set(drawn.tolist()) == {1, 3}


def test_sampled_labels_have_the_right_frequencies():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    n = 20_000
    u = uniforms(0, torch.arange(n // 100), torch.arange(100).repeat(n // 100, 1)).flatten()
    counts = sample_labels(logits.repeat(n, 1), u).bincount(minlength=4)
    expected = n * logits.softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.27  # 99.9 % quantile with 3 degrees of freedom; the seed is fixed
