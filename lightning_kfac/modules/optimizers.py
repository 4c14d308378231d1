"""Optimizers: the one that does nothing, and the ones that train a demo model."""

import math
from collections.abc import Callable
from typing import overload

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

FINAL_LR = 0.1


class _Stepper(Optimizer):
    """Runs the closure, then updates."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError


class NoOptimizer(_Stepper):
    """Runs the closure (forward and backward) and changes nothing.

    Lightning then counts steps, checkpoints and shows progress as in any training.
    """

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {})

    @override
    def _update(self) -> None:
        """Changes nothing."""


class Muon(_Stepper):
    """Muon (Jordan et al., 2024) in the precision of the weights.

    ``torch.optim.Muon`` orthogonalizes in bfloat16, which CPUs without such instructions emulate: there a
    step of the demo model takes 2 seconds instead of 0.1. Learning rates match those of AdamW (Liu et al., 2025).

    Args:
        matrices: Parameters [d_out, d_in].
        lr, weight_decay: As in AdamW.
        momentum: Of the Nesterov momentum.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @override
    @torch.no_grad()
    def _update(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of a matrix U S V^T [d_out, d_in], by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices that are no embeddings, and embeddings, norms and biases."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return matrices, rest


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on everything; only matrices decay."""
    matrices, rest = matrices_and_rest(model)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


class MuonAdamW(_Stepper):
    """Muon on matrices, AdamW on embeddings, norms and biases, stepped as one."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        matrices, rest = matrices_and_rest(model)
        self.muon = Muon(matrices, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
        super().__init__([p for p in model.parameters()], {"lr": lr})
        # One list of groups, so that a scheduler reaches both.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @override
    def _update(self) -> None:
        self.muon.step()
        self.adamw.step()


TRAINED_BY: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {"muon": MuonAdamW, "adamw": adamw}


def training_optimizers(optimizer: Optimizer, warmup: int, steps: int) -> OptimizerLRSchedulerConfig:
    """An optimizer and its schedule: linear warm-up and cosine decay to 10 % over ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
