"""Slow and obvious computations in float64, written without the package's own."""

import numpy as np
import torch
from torch import nn
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


def sampled_targets(model: nn.Module, rows: list[list[int]], seed: int) -> list[list[int]]:
    """Labels drawn as the design says, one token at a time: smallest k with cdf_k > u cdf_last."""
    drawn = []
    for index, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double().numpy()
        bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
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
