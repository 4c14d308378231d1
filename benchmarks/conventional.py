"""The conventional way to collect K-FAC factors, written from its description for comparison.

Mean loss, gradient checkpointing through the whole model (from the embeddings on), gradients of the
tracked weights, full float32 products, a few blocks a pass, logits whole.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conventional_factors(
    model: nn.Module, batches: list[dict], blocks: list[int], projections: tuple[str, ...], blocks_per_pass: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Layer name -> (A, G, number of positions), A and G of the mean loss, with gold labels.

    Leaves the embeddings with gradients switched on, as reentrant checkpointing needs: give it a copy.
    """
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found = {}
    for start in range(0, len(blocks), blocks_per_pass):
        model.requires_grad_(False)
        collectors = {}
        for block in blocks[start : start + blocks_per_pass]:
            for projection in projections:
                name = f"model.layers.{block}.mlp.{projection}_proj"
                layer = model.get_submodule(name)
                layer.weight.requires_grad_(True)
                collectors[name] = _Collector(layer)
        for batch in batches:
            model.zero_grad(set_to_none=True)
            ids = batch["input_ids"]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].float()
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, collector in collectors.items():
            found[name] = (collector.A / collector.n, collector.G / collector.n, collector.n)
            collector.remove()
    model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)
    return found


class _Collector:
    def __init__(self, layer: nn.Linear):
        device = layer.weight.device
        self.A = torch.zeros(layer.in_features, layer.in_features, device=device)
        self.G = torch.zeros(layer.out_features, layer.out_features, device=device)
        self.n = 0
        self._input = None
        self._handles = [layer.register_forward_hook(self._forward), layer.register_full_backward_hook(self._backward)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, layer, args, output) -> None:
        if torch.is_grad_enabled():
            self._input = args[0][:, :-1].detach().flatten(0, 1).float()

    def _backward(self, layer, grad_input, grad_output) -> None:
        g = grad_output[0][:, :-1].detach().flatten(0, 1).float()
        self.A.add_(self._input.T @ self._input)
        self.G.add_(g.T @ g)
        self.n += len(g)
        self._input = None
