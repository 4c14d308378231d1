"""Slow and obvious computations in float64, written without the package's own."""

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


def one_row_factors(
    model: nn.Module,
    names: list[str],
    rows: list[list[int]],
    targets: list[list[int]],
    dtype: torch.dtype = torch.double,
) -> dict:
    """A and G of each layer by plain autograd in float64: one unpadded row at a time.

    Args:
        targets: For each row the label of each of its positions but the last.
        dtype: Of the model's arithmetic; some families have float32 written into their code.

    Returns:
        Layer name -> (A, G, number of positions).
    """
    model = model.to(dtype)
    layers = dict(model.named_modules())
    sums = {}
    for row, labels in zip(rows, targets, strict=True):
        if len(row) < 2:
            continue
        seen = {}

        def remember(layer, args, output, seen=seen):
            output.retain_grad()
            seen[layer] = (args[0].detach().flatten(0, -2).double(), output)

        handles = [layers[n].register_forward_hook(remember) for n in names]
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        loss = -logits.log_softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)].sum()
        loss.backward()
        for handle in handles:
            handle.remove()
        for name in names:
            a, output = seen[layers[name]]
            A, G, n = sums.get(name, (0, 0, 0))
            for t in range(len(labels)):
                A = A + torch.outer(a[t], a[t])
                g = output.grad.flatten(0, -2)[t].double()
                G = G + torch.outer(g, g)
            sums[name] = (A, G, n + len(labels))
    return {name: (A / n, G / n, n) for name, (A, G, n) in sums.items()}


class Products(TorchFunctionMode):
    """Remembers a [n, d_in] and z [n, d_out] of every product with a weight, or an expert's part of one."""

    FIRST = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, nn.functional.linear)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
        self.seen = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        z = function(*args, **(kwargs or {}))
        if function in self.FIRST:
            self._note(args[0], args[1], z)
        elif function is torch.addmm:
            self._note(args[1], args[2], z)
        return z

    def _note(self, a, weight, z):
        name, parameter = self.names.get(weight.untyped_storage().data_ptr(), (None, None))
        if name is None or not z.requires_grad:
            return
        z.retain_grad()
        expert = None
        if parameter.ndim == 3 and weight.ndim == 2:
            expert = weight.storage_offset() // parameter[0].numel()
        if weight.ndim == 2:
            self.seen.setdefault((name, expert), []).append((a.detach(), z))
            return
        for expert, inputs in enumerate(a.detach()):  # all positions, zero where they are not routed to it
            routed = inputs.any(dim=-1)
            self.seen.setdefault((name, expert), []).append((inputs[routed], (z, expert, routed)))


def untied(model: nn.Module) -> nn.Module:
    """The model, with a weight of its own for each linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


def product_factors(model: nn.Module, rows: list[list[int]], dtype: torch.dtype = torch.double) -> dict:
    """A, G and count of every weight that a product is taken with, by plain autograd, one unpadded row at a time.

    Labels are the text's own next tokens. A row's last token is left out: a causal model's other positions do not
    depend on it. The model is changed: of a weight that several modules share each gets a copy, experts run one by one.

    Args:
        dtype: As of ``one_row_factors``.

    Returns:
        (parameter, expert or None) -> (A, G, n) in float64.
    """
    model = untied(model.to(dtype))
    model.set_experts_implementation("eager")
    sums = {}
    for row in rows:
        with Products(model) as products:
            logits = forward_alone(model, row[:-1])
        (-logits[0].log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum()).backward()
        for key, pairs in products.seen.items():
            for a, z in pairs:
                g = z[0].grad[z[1]][z[2]] if isinstance(z, tuple) else z.grad
                if g is None:
                    continue
                a, g = (x.reshape(-1, x.shape[-1]).double() for x in (a, g))
                A, G, n = sums.get(key, (0, 0, 0))
                sums[key] = A + a.T @ a, G + g.T @ g, n + len(a)
    return {key: (A / max(n, 1), G / max(n, 1), n) for key, (A, G, n) in sums.items()}


def forward_alone(model: nn.Module, row: list[int]) -> torch.Tensor:
    """Logits of a row by itself, without a cache. [1, T, V]."""
    # Without a mask XLM takes genuine tokens for padding.
    mask = {"attention_mask": torch.ones(1, len(row), dtype=torch.long)} if model.config.model_type == "xlm" else {}
    return model(input_ids=torch.tensor([row]), use_cache=False, **mask).logits


@torch.no_grad()
def logits_alone(model: nn.Module, row: list[int]) -> torch.Tensor:
    """Logits of a row by itself, without a cache. float64 [T, V]."""
    return forward_alone(model, row)[0].double()


def greedy(model: nn.Module, prefix: list[int], length: int) -> list[int]:
    """Greedy decoding by one forward a token."""
    row = list(prefix)
    for _ in range(length):
        row.append(logits_alone(model, row)[-1].argmax().item())
    return row[len(prefix) :]


def sampled_targets(model: nn.Module, rows: list[list[int]], seed: int, draw: int = 0) -> list[list[int]]:
    """Labels drawn as the design says, one token at a time: smallest k with cdf_k > u cdf_last."""
    drawn = []
    for index, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double().numpy()
        bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=[0, 0, 0, draw])
        numbers = np.random.Generator(bits).random(len(row))
        labels = []
        for t in range(len(row) - 1):
            weights = np.exp(logits[t] - logits[t].max())
            cdf = np.cumsum(weights / weights.sum())
            labels.append(next(k for k in range(len(cdf)) if cdf[k] > numbers[t] * cdf[-1]))
        drawn.append(labels)
    return drawn


def full_sort_selection(importance: torch.Tensor, rho: float) -> list[tuple[int, int]]:
    """The kept components by Python's stable sort and an exact sum."""
    import math

    cells = [(i, j) for i in range(importance.shape[0]) for j in range(importance.shape[1])]
    if rho == 1:
        return cells
    values = {cell: float(importance[cell]) for cell in cells}
    order = sorted(cells, key=lambda cell: -values[cell])
    target = rho * math.fsum(values.values()) * (1 - 1e-12)
    kept, total = [], []
    for cell in order:
        if rho == 0 or math.fsum(total) >= target:
            break
        kept.append(cell)
        total.append(values[cell])
    return sorted(kept)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """W with z = W a, in float64."""
    weight = layer.weight.detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight


def edit_distance(a: list, b: list) -> int:
    """Levenshtein by the textbook table."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]
