"""Eigenbases: how they are computed, and that they are kept beside the factors."""

import pytest
import torch

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_factors, load_factors, save_factors
from lightning_kfac.math.spectrum import eigenbasis
from tests.common import batched, build_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(8, 8),  # rank one
        torch.zeros(8, 8),
        torch.eye(8) * 1e30,
        torch.eye(8) * 1e-30,
        torch.tensor([[3.0]]),
        torch.diag(torch.tensor([1.0, 0.0, 0.0, 1e-20])),
    ],
    ids=["rank one", "zero", "huge", "tiny", "1 x 1", "deficient"],
)
def test_eigenbasis_of_difficult_matrices(matrix, dtype):
    values, vectors = eigenbasis(matrix, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert vectors.dtype == dtype and values.dtype == torch.float64
    assert (values >= 0).all() and (values.diff() <= 0).all()
    rebuilt = vectors.double() @ torch.diag(values) @ vectors.double().T
    assert (rebuilt - matrix.double()).norm() <= tolerance * max(matrix.double().norm(), 1e-300)
    assert (vectors.double().T @ vectors.double() - torch.eye(len(matrix))).norm() <= 10 * tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eigenbasis_refuses_what_is_not_finite(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(InputError, match="A of fc has NaN or infinite entries"):
        eigenbasis(matrix, "A of fc")


def test_eigenbasis_refuses_a_clearly_negative_eigenvalue_and_clamps_rounding():
    with pytest.raises(InputError, match=r"A of fc has the eigenvalue -0\.5 beside a largest of 2"):
        eigenbasis(torch.diag(torch.tensor([2.0, -0.5])), "A of fc")
    assert eigenbasis(torch.diag(torch.tensor([2.0, -1e-8]))).values.tolist() == [2.0, 0.0]


def test_a_float32_solver_that_fails_is_followed_by_jitter_and_float64(monkeypatch):
    solve, tried = torch.linalg.eigh, []

    def float64_only(matrix):
        tried.append((matrix.dtype, float(matrix.diagonal().sum())))
        if matrix.dtype == torch.float32:
            raise RuntimeError("CUSOLVER_STATUS_INVALID_VALUE")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", float64_only)
    values, vectors = eigenbasis(torch.diag(torch.tensor([4.0, 1.0])), dtype=torch.float32)
    assert [dtype for dtype, _ in tried] == [torch.float32, torch.float32, torch.float64]
    assert tried[1][1] > tried[0][1]  # the second with jitter
    assert values.tolist() == pytest.approx([4, 1], rel=1e-5) and vectors.dtype == torch.float32


def test_a_solver_that_returns_nan_is_not_believed(monkeypatch):
    solve, calls = torch.linalg.eigh, []

    def nan_first(matrix):
        calls.append(1)
        values, vectors = solve(matrix)
        return (values * float("nan"), vectors) if len(calls) == 1 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", nan_first)
    assert eigenbasis(torch.eye(2)).values.tolist() == pytest.approx([1, 1], rel=1e-8)


def test_bases_are_computed_once_and_kept_beside_the_factors(tmp_path, rows, monkeypatch):
    model = build_model("llama")
    save_factors(collect_factors(model, batched(rows, 3)), tmp_path / "f")
    solve, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(len(m)), solve(m))[1])
    factors = load_factors(tmp_path / "f")
    for rho in (0.5, 0.7):
        editor = KFACEditor(model, factors, EditConfig(rho=rho))
        editor.apply()
        editor.restore()
    # 3 blocks: G of gate, up (40) and down (24); A of gate and up together (24) and of down (40)
    assert sorted(sizes) == [24] * 6 + [40] * 9
    sizes.clear()
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert not sizes
    damaged = next((tmp_path / "f" / "bases").iterdir())
    damaged.write_bytes(b"12")
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert len(sizes) == 1  # only the damaged one
    KFACEditor(model, load_factors(tmp_path / "f"), dtype="float32").apply(dry_run=True)
    assert len(sizes) == 16  # another precision is another basis


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
