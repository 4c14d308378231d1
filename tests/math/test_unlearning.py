"""Losses and steps of other methods against plain float64 loops."""

import math

import pytest
import torch

from lightning_kfac.math.unlearning import block_part, margins, npo, subnet_mask, target_log_p, trailing
from tests.common import generator


def logits_and_targets():
    logits = torch.randn(3, 4, 7, generator=generator(1), dtype=torch.float64)
    targets = torch.randint(7, (3, 4), generator=generator(2))
    targets[0, 2] = targets[2, :] = -100
    return logits, targets


def test_log_probabilities_and_margins_are_those_of_a_loop():
    logits, targets = logits_and_targets()
    log_p = target_log_p(logits, targets)
    found = iter(margins(logits, targets).tolist())
    for i in range(3):
        for j in range(4):
            z, gold = logits[i, j].tolist(), int(targets[i, j])
            if gold == -100:
                assert log_p[i, j] == 0
                continue
            assert log_p[i, j].item() == pytest.approx(z[gold] - math.log(sum(map(math.exp, z))), abs=1e-12)
            assert next(found) == pytest.approx(z[gold] - max(v for k, v in enumerate(z) if k != gold), abs=1e-12)
    assert next(found, None) is None


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_npo_and_its_gradient_are_the_papers(beta):
    """Equation 3 of arXiv 2404.05868; gradient: W * gradient of log pi, W = 2 pi^b / (pi^b + ref^b) (section 3)."""
    log_p = torch.tensor([-3.0, -0.5, -40.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -2.5, -40.0], dtype=torch.float64)
    losses = npo(log_p, reference, beta)
    for loss, p, r in zip(losses.tolist(), log_p.tolist(), reference.tolist(), strict=True):
        assert loss == pytest.approx(2 / beta * math.log(1 + math.exp(p - r) ** beta), rel=1e-12)
    losses.sum().backward()
    ratio = (log_p.detach().exp() ** beta, reference.exp() ** beta)
    assert torch.allclose(log_p.grad, 2 * ratio[0] / (ratio[0] + ratio[1]), rtol=1e-12)


def test_npo_keeps_its_gradient_where_probabilities_are_none():
    log_p = torch.tensor([-4000.0, -3000.0], requires_grad=True)
    loss = npo(log_p, torch.tensor([-10.0, -4000.0]), 1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2000.0] and log_p.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_the_mask_drops_the_largest_scores_and_lets_gradients_through(ratio):
    scores = torch.randn(6, 5, generator=generator(3), dtype=torch.float64).requires_grad_()
    mask = subnet_mask(scores, ratio)
    order = sorted(range(30), key=lambda k: -abs(scores.flatten()[k].item()))
    dropped = set(order[: round(ratio * 30)])
    assert [int(v) for v in mask.flatten()] == [int(k not in dropped) for k in range(30)]
    weights = torch.randn(6, 5, generator=generator(4), dtype=torch.float64)
    (mask * weights).sum().backward()
    assert torch.equal(scores.grad, -weights * scores.detach().sign())


def test_a_block_and_what_is_left_give_back_the_weight_exactly():
    W = torch.randn(20, 13, generator=generator(5))
    G = torch.linalg.qr(torch.randn(20, 20, generator=generator(6), dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(13, 13, generator=generator(7), dtype=torch.float64)).Q
    for rows, columns in ((trailing(20, 0.6), trailing(13, 0.6)), (slice(0, 4), slice(3, 5)), (slice(0), slice(2))):
        part = block_part(W.double(), G, A, rows, columns)
        assert torch.equal(((W.double() - part) + part).float(), W)
        expected = torch.zeros(20, 13, dtype=torch.float64)
        for i in range(20)[rows]:
            for j in range(13)[columns]:
                expected += torch.outer(G[:, i], A[:, j]) * (G[:, i] @ W.double() @ A[:, j])
        assert torch.allclose(part, expected, rtol=0, atol=1e-13)
    assert torch.equal(block_part(W, G.float(), A.float(), trailing(20, 1), trailing(13, 1)), W)


def test_the_flattest_directions_are_the_last():
    assert trailing(10, 0.6) == slice(4, 10) and trailing(10, 0.0) == slice(10, 10) and trailing(10, 1) == slice(0, 10)
