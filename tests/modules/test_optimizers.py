"""Muon against torch's own, and which parameters decay."""

import torch

from lightning_kfac.modules.optimizers import Muon, adamw, orthogonalized
from tests.common import build_model


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


def test_adamw_takes_every_parameter_once_and_decays_matrices_alone():
    model = build_model("olmo2")
    decaying, rest = adamw(model, lr=0.01, weight_decay=0.1).param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    known = [id(p) for group in (decaying, rest) for p in group["params"]]
    assert sorted(known) == sorted(id(p) for p in model.parameters())
    assert {p.ndim for p in decaying["params"]} == {2}
    names = {name for name, p in model.named_parameters() if id(p) in {id(q) for q in rest["params"]}}
    assert names and all("norm" in name or "embed" in name for name in names)
