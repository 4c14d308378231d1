"""A loss of one's own."""

import copy

import torch
from torch import nn

from lightning_kfac import collect_factors
from tests.common import TOLERANCE, relative_error


def test_own_loss_on_a_classifier():
    """An encoder over masked positions and a classifier head with one vector a row."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, mask):
            hidden = torch.tanh(self.encoder(x)) * mask[..., None]
            return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))

    model = Classifier()
    x, y = torch.randn(5, 4, 6), torch.randint(0, 3, (5,))
    mask = torch.tensor([[1, 1, 1, 1]] * 3 + [[1, 1, 0, 0]] * 2)

    def loss_fn(model, batch):
        logits = model(batch["x"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["y"], reduction="sum")

    batches = [{"x": x[s], "y": y[s], "attention_mask": mask[s]} for s in (slice(0, 2), slice(2, 5))]
    found = collect_factors(model, batches, modules=["encoder", "head"], loss_fn=loss_fn)
    double, A, G, head_G = copy.deepcopy(model).double(), 0, 0, 0
    for i in range(5):
        z = double.encoder(x[i].double()).detach().requires_grad_(True)
        hidden = (torch.tanh(z) * mask[i][:, None]).sum(0) / mask[i].sum()
        logits = double.head(hidden)
        logits.retain_grad()
        nn.functional.cross_entropy(logits, y[i], reduction="sum").backward()
        for t in range(int(mask[i].sum())):
            A = A + torch.outer(x[i, t], x[i, t]).double()
            G = G + torch.outer(z.grad[t], z.grad[t])
        head_G = head_G + torch.outer(logits.grad, logits.grad)
    assert (found["encoder"].n_tokens, found["head"].n_tokens) == (16, 5)
    assert relative_error(found["encoder"].A, A / 16) < TOLERANCE
    assert relative_error(found["encoder"].G, G / 16) < TOLERANCE
    assert relative_error(found["head"].G, head_G / 5) < TOLERANCE
