"""Eigenbases of factors."""

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.math.spectrum import eigenbasis


def test_eigenbasis_falls_back_where_a_solver_fails(monkeypatch):
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    solve, calls = torch.linalg.eigh, []

    def failing(m):
        calls.append(m)
        if len(calls) < 2:
            raise torch.linalg.LinAlgError("no")
        return solve(m)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    assert eigenbasis(matrix).values.tolist() == pytest.approx([3, 2, 1], rel=1e-8)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(InputError, match="G of fc: its eigendecomposition does not converge"):
        eigenbasis(matrix, "G of fc")
