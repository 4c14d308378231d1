"""Losses of tokens against a loop in float64."""

import math

import pytest
import torch

from lightning_kfac.metrics.functional import perplexity as module
from lightning_kfac.metrics.functional import token_losses
from tests.common import generator


def expected_losses(logits, targets):
    found = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        largest = max(row)
        found.append(largest + math.log(math.fsum(math.exp(z - largest) for z in row)) - row[target])
    return found


# float64 logits keep float64; the others are rounded about once at a loss of 10.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("n", [1, 5])
def test_losses_are_a_loop(n, dtype, tolerance):
    logits = (3 * torch.randn(n, 11, generator=generator(), dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, 11, (n,), generator=generator(1))
    found = token_losses(logits, targets)
    assert found.dtype == torch.float64 and found.shape == (n,)
    assert found.tolist() == pytest.approx(expected_losses(logits, targets), abs=tolerance)


@pytest.mark.parametrize("at_once", [1, 3, 4, 7, 8])
def test_slices_change_no_loss(at_once, monkeypatch):
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", at_once)
    logits = torch.randn(7, 5, generator=generator(), dtype=torch.float64)
    targets = torch.randint(0, 5, (7,), generator=generator(1))
    assert token_losses(logits, targets).tolist() == pytest.approx(expected_losses(logits, targets), rel=1e-13)


def test_more_positions_than_one_slice():
    logits = torch.randn(2500, 3, generator=generator(), dtype=torch.float64)
    targets = torch.randint(0, 3, (2500,), generator=generator(1))
    assert token_losses(logits, targets).tolist() == pytest.approx(expected_losses(logits, targets), rel=1e-12)


def test_huge_and_impossible():
    """A certain token costs nothing, whatever the scale; one with probability zero costs without end."""
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0], [0.0, -math.inf]])
    assert token_losses(logits, torch.tensor([0, 1, 1])).tolist() == [0, 1e4, math.inf]
    assert math.isnan(token_losses(torch.tensor([[math.nan, 0.0]]), torch.tensor([1])).item())


def test_a_small_loss_in_float64_is_not_lost():
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    assert token_losses(logits, torch.tensor([1])).item() == pytest.approx(40 + math.log1p(math.exp(-40)), rel=1e-15)
    gap = torch.tensor([[20.0, 0.0]], dtype=torch.float64)
    assert token_losses(gap, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)
