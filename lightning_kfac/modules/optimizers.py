"""Optimizers: the one that does nothing, and the ones that train a demo model."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FINAL_LR = 0.1


class NoOptimizer(Optimizer):
    """Runs the closure (forward and backward) and changes nothing.

    Lightning then counts steps, checkpoints and shows progress as in any training.
    """

    def __init__(self):
        super().__init__([torch.zeros(())], {})

    def step(self, closure: Callable | None = None):
        """Runs the closure."""
        return None if closure is None else closure()


class MuonAdamW(Optimizer):
    """Muon on matrices, AdamW on embeddings, norms and biases, stepped as one."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
        rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
        super().__init__([p for p in model.parameters()], {"lr": lr})
        # One list of groups, so that a scheduler reaches both.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure: Callable | None = None):
        """One step of both."""
        loss = None if closure is None else closure()
        self.muon.step()
        self.adamw.step()
        return loss


def training_optimizers(model: nn.Module, lr: float, weight_decay: float, warmup: int, steps: int) -> dict:
    """Optimizer and a schedule of linear warm-up and cosine decay to 10 % over ``steps``."""
    optimizer = MuonAdamW(model, lr, weight_decay)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
