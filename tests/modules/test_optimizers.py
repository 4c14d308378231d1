"""Muon against torch's own."""

import torch

from lightning_kfac.modules.optimizers import Muon, orthogonalized


def test_muon_takes_the_steps_of_torchs_own():
    """Torch's own runs in bfloat16, so they agree to about 1 %; what ours orthogonalizes is checked by its spectrum."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1))) for _ in "12")
    start = ours.detach().clone()
    optimizers = [
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(5):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    values = torch.linalg.svdvals(orthogonalized(torch.randn(40, 24, generator=torch.Generator().manual_seed(3))))
    assert values.min() > 0.6 and values.max() < 1.3
