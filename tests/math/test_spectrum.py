"""Eigenbases against what they must reconstruct."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.math.spectrum import eigenbasis
from tests.common import generator


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_eigenbasis_reconstructs(rank):
    x = torch.randn(rank, 9, generator=generator(), dtype=torch.float64)
    matrix = x.T @ x
    values, vectors = eigenbasis(matrix.float())
    assert (values.diff() <= 0).all() and (values >= 0).all()
    assert torch.allclose(vectors.T @ vectors, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert ((vectors * values) @ vectors.T - matrix).norm() / matrix.norm() < 1e-6  # the float32 input


def test_wrong_matrices_have_no_eigenbasis():
    with pytest.raises(InputError, match="A of fc has NaN"):
        eigenbasis(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "A of fc")
    with pytest.raises(InputError, match="eigenvalue -1"):
        eigenbasis(torch.diag(torch.tensor([2.0, -1.0])))
