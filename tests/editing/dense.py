"""A small layer, factors of it, and its edits the slow way in float64."""

import torch
from torch import nn

from lightning_kfac import KFACEditor, KroneckerFactors
from tests.common import generator

D_OUT, D_IN = 6, 5
CELLS = [(i, j) for i in range(D_OUT) for j in range(D_IN)]


def random_factors(seed: int) -> KroneckerFactors:
    """Factors with a decaying spectrum, as real ones have."""
    seen = []
    for size, shift in ((D_IN, 0), (D_OUT, 100)):
        scales = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
        seen.append(torch.randn(40, size, generator=generator(seed + shift), dtype=torch.float64) * scales)
    a, g = seen
    squares = [(x**2).sum(1, keepdim=True) for x in seen]
    made = [a.T @ a, g.T @ g, a.T @ (squares[1] * a), g.T @ (squares[0] * g)]
    A, G, A_coupled, G_coupled = ((matrix / 40).float() for matrix in made)
    return KroneckerFactors(A, G, 40, A_coupled, G_coupled)


def one_layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential()
    model.fc = nn.Linear(D_IN, D_OUT, bias=False)
    model.fc.weight.data = torch.randn(D_OUT, D_IN, generator=generator(7)).to(dtype)
    return model


GENERAL, DOMAIN, OTHER = {"fc": random_factors(1)}, {"fc": random_factors(2)}, {"fc": random_factors(3)}
MOMENTS = {"fc": torch.rand(D_OUT, D_IN, generator=generator(5)) ** 3}


def dense_basis(A, G):
    (mu, U_A), (lam, U_G) = torch.linalg.eigh(A.double()), torch.linalg.eigh(G.double())
    return lam.flip(0).clamp(min=0), U_G.flip(1), mu.flip(0).clamp(min=0), U_A.flip(1)


def first_cells(importance, count):
    """The ``count`` largest by Python's stable sort."""
    return sorted(sorted(CELLS, key=lambda cell: -float(importance[cell]))[:count])


def masked(C, cells, U_G, U_A):
    mask = torch.zeros_like(C)
    for cell in cells:
        mask[cell] = 1
    return U_G @ (C * mask) @ U_A.T


def edit(config, weight_dtype=torch.float32, **options):
    model = one_layer(weight_dtype)
    report = KFACEditor(model, GENERAL, config, **options).apply()
    return model.fc.weight.detach(), report.layers[0]


def dense_importance(formula, C, lam, mu, moments=None):
    """Of the layer ``fc`` with the factors GENERAL."""
    S = lam[:, None] * mu if not formula.startswith("corrected") else moments
    if formula == "magnitude":
        return C**2
    if formula == "foof":
        return mu.expand(D_OUT, -1)
    if formula.startswith("coupled") or formula == "output_side":
        layer = GENERAL["fc"]
        _, U_G, _, U_A = dense_basis(layer.A, layer.G)
        r = torch.stack([U_G[:, i] @ layer.G_coupled.double() @ U_G[:, i] for i in range(D_OUT)])
        c = torch.stack([U_A[:, j] @ layer.A_coupled.double() @ U_A[:, j] for j in range(D_IN)])
        S = torch.outer(r, c) / r.sum() if formula.startswith("coupled") else torch.outer(r, torch.ones_like(c))
    return S * C**2 if formula.endswith("modified") or formula == "output_side" else S
