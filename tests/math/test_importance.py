"""Importances against loops over components."""

import hashlib

import pytest
import torch

from lightning_kfac.math.importance import components, curvature_along, modified, original, random
from tests.common import generator


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def test_components_are_the_weight_between_eigenvectors():
    W, U_G, U_A = numbers(3, 4), numbers(3, 3, seed=1), numbers(4, 4, seed=2)
    found = components(W, U_G, U_A)
    assert found.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert found[i, j].item() == pytest.approx((U_G[:, i] @ W @ U_A[:, j]).item(), rel=1e-12)


def test_original_is_the_product_of_eigenvalues():
    rows, columns = [3.0, 1.0, 0.0], [5.0, 0.25]
    found = original(torch.tensor(rows), torch.tensor(columns))
    assert found.tolist() == [[row * column for column in columns] for row in rows]


def test_modified_is_curvature_times_the_squared_component():
    curvature, c = numbers(3, 4).abs(), numbers(3, 4, seed=1, dtype=torch.float32)
    found = modified(curvature, c)
    assert found.dtype == torch.float64
    for i in range(3):
        for j in range(4):
            assert found[i, j].item() == curvature[i, j].item() * c[i, j].item() ** 2
    assert modified(torch.tensor([[2.0]]), torch.tensor([[1e-30]])).item() == pytest.approx(2e-60, rel=1e-6)


def test_random_is_fixed_by_the_seed_and_the_name():
    found = random((3, 4), 7, "block.3.up")
    assert found.dtype == torch.float64 and found.shape == (3, 4)
    assert ((found >= 0) & (found < 1)).all() and found.unique().numel() == 12
    state = int.from_bytes(hashlib.sha256(b"7 block.3.up").digest()[:7], "big")
    expected = torch.rand(3, 4, generator=torch.Generator().manual_seed(state), dtype=torch.float64)
    assert torch.equal(found, expected)
    torch.manual_seed(1)  # the process's own generator plays no part
    assert torch.equal(found, random((3, 4), 7, "block.3.up"))
    for other in (random((3, 4), 8, "block.3.up"), random((3, 4), 7, "block.3.down")):
        assert not torch.isin(other, found).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_along_each_column(dtype):
    x, vectors = numbers(6, 4), numbers(4, 4, seed=1, dtype=dtype)
    matrix = x.T @ x
    found = curvature_along(matrix, vectors)
    assert found.dtype == torch.float64 and found.shape == (4,)
    for k in range(4):
        exact = (vectors[:, k].double() @ matrix @ vectors[:, k].double()).item()
        assert found[k].item() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-12)
    narrow = curvature_along(matrix.float(), vectors)
    assert narrow.dtype == torch.float64 and narrow.tolist() == pytest.approx(found.tolist(), rel=1e-5)


def test_curvature_is_never_negative():
    """Rounding may put a vanishing u^T M u below zero."""
    matrix = torch.diag(torch.tensor([1.0, -1e-9, 0.5]))
    assert curvature_along(matrix, torch.eye(3)).tolist() == [1, 0, 0.5]
