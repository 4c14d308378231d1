"""Eigenbases against what they must reconstruct, and what happens where a solver fails."""

import math

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.math.spectrum import Spectrum, _attempts, _eigh, effective_rank, eigenbasis
from tests.common import generator


def example(rank, size=9):
    """A positive semi-definite matrix, float64."""
    x = torch.randn(rank, size, generator=generator(), dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_eigenbasis_reconstructs(rank):
    x = torch.randn(rank, 9, generator=generator(), dtype=torch.float64)
    matrix = x.T @ x
    values, vectors = eigenbasis(matrix.float())
    assert (values.diff() <= 0).all() and (values >= 0).all()
    assert torch.allclose(vectors.T @ vectors, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert ((vectors * values) @ vectors.T - matrix).norm() / matrix.norm() < 1e-6  # the float32 input


# Rounding of the solver, in units of the largest eigenvalue.
PRECISION = {torch.float32: 3e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_every_scale_and_precision(scale, dtype, given):
    """Entries near the ends of float32's range too: 1e30 squared would overflow, 1e-30 squared vanish."""
    matrix = (scale * example(9)).to(given)
    values, vectors = eigenbasis(matrix, dtype=dtype)
    assert values.dtype == torch.float64 and vectors.dtype == dtype
    again = (vectors.double() * values) @ vectors.double().T
    assert (again - matrix.double()).norm() / matrix.double().norm() < PRECISION[dtype]
    assert (values.diff() <= 0).all() and (values >= 0).all()
    exact = torch.linalg.eigvalsh(matrix.double() / scale).flip(0).clamp(min=0) * scale
    assert (values - exact).abs().max() < PRECISION[dtype] * exact[0]


def test_eigenvectors_belong_to_their_eigenvalues():
    values, vectors = eigenbasis(torch.diag(torch.tensor([1.0, 9.0, 4.0])))
    assert values.tolist() == pytest.approx([9, 4, 1], rel=1e-14)
    assert torch.allclose(vectors.abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]], atol=1e-14)


def test_one_by_one():
    values, vectors = eigenbasis(torch.tensor([[4.0]]))
    assert values.tolist() == [4] and vectors.abs().tolist() == [[1]]


def test_a_nearly_symmetric_matrix_counts_as_its_symmetric_part():
    matrix = example(9)
    skew = torch.randn(9, 9, generator=generator(5), dtype=torch.float64)
    values, _ = eigenbasis(matrix + 0.01 * (skew - skew.T))
    # The factor is divided by its largest entry, which the skew part moves: beyond that it plays no part.
    assert values.tolist() == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0).tolist(), rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_of_zeros_has_zeros_and_the_unit_basis(dtype):
    values, vectors = eigenbasis(torch.zeros(3, 3), dtype=dtype)
    assert values.dtype == torch.float64 and values.tolist() == [0, 0, 0]
    assert vectors.dtype == dtype and torch.equal(vectors, torch.eye(3, dtype=dtype))
    on_meta = Spectrum(values, vectors).to("meta")
    assert on_meta.values.is_meta and on_meta.vectors.is_meta
    assert on_meta.values.shape == (3,) and on_meta.vectors.shape == (3, 3)


def test_small_negative_eigenvalues_are_rounding():
    values, _ = eigenbasis(torch.diag(torch.tensor([2.0, -1.9e-4])))
    assert values.tolist() == [2, 0]
    with pytest.raises(InputError, match=r"eigenvalue -0\.00021 beside a largest of 2"):
        eigenbasis(torch.diag(torch.tensor([2.0, -2.1e-4])))
    with pytest.raises(InputError, match="eigenvalue -3 beside a largest of 3"):
        eigenbasis(torch.diag(torch.tensor([-3.0, -1.0])))  # the largest in size counts


def test_rounding_is_measured_by_the_largest_eigenvalue():
    """Ten features that are all the same have one eigenvalue of 10, whatever their largest entry is."""
    same, unit = torch.ones(10, 10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    for scale in (1e-6, 1.0, 1e6):
        values, _ = eigenbasis(scale * (same - 9e-4 * (unit - same / 10)))
        assert values.tolist() == pytest.approx([10 * scale, *[0] * 9], rel=1e-12)
        with pytest.raises(InputError, match="eigenvalue"):
            eigenbasis(scale * (same - 11e-4 * (unit - same / 10)))
    # On the bound itself it still is rounding.
    assert eigenbasis(torch.diag(torch.tensor([1.0, -1e-4], dtype=torch.float64))).values.tolist() == [1, 0]


def test_wrong_matrices_have_no_eigenbasis():
    with pytest.raises(InputError, match="A of fc has NaN"):
        eigenbasis(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "A of fc")
    with pytest.raises(InputError, match="A of fc has NaN or infinite"):
        eigenbasis(torch.tensor([[1.0, 0.0], [0.0, float("inf")]]), "A of fc")
    with pytest.raises(InputError, match="eigenvalue -1"):
        eigenbasis(torch.diag(torch.tensor([2.0, -1.0])))


def test_an_unnamed_matrix_is_called_matrix():
    with pytest.raises(InputError, match=r"^matrix has NaN"):
        eigenbasis(torch.full((1, 1), float("nan")))


class Solver:
    """torch.linalg.eigh that fails so many times first, and keeps what it was asked."""

    def __init__(self, monkeypatch, failures):
        self.asked, self.failures, self.eigh = [], list(failures), torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", self)

    def __call__(self, matrix):
        self.asked.append(matrix)
        failure = self.failures.pop(0) if self.failures else None
        if failure == "error":
            raise RuntimeError("cuSOLVER")
        values, vectors = self.eigh(matrix)
        if failure == "values":
            values[0] = float("nan")
        if failure == "vectors":
            vectors[0, 0] = float("nan")
        return values, vectors


@pytest.mark.parametrize("failure", ["error", "values", "vectors"])
@pytest.mark.parametrize(("dtype", "attempts"), [(torch.float32, 4), (torch.float64, 2)])
def test_failed_solvers_are_followed_by_others(monkeypatch, failure, dtype, attempts):
    """As it is, with a jitter on the diagonal, and both in float64 where it was float32."""
    matrix = example(9)
    for failures in range(attempts):
        solver = Solver(monkeypatch, [failure] * failures)
        values, vectors = eigenbasis(matrix, dtype=dtype)
        monkeypatch.undo()
        assert len(solver.asked) == failures + 1
        assert [asked.dtype for asked in solver.asked] == [dtype, dtype, torch.float64, torch.float64][: failures + 1]
        assert vectors.dtype == dtype and values.dtype == torch.float64
        again = (vectors.double() * values) @ vectors.double().T
        assert (again - matrix).norm() / matrix.norm() < 1e-5  # a jitter of 1e-6 of the mean eigenvalue
        first, unit = (matrix / matrix.abs().max()).to(dtype), torch.eye(9, dtype=dtype)
        assert torch.allclose(solver.asked[0], first, rtol=1e-14)
        for number, asked in enumerate(solver.asked):
            share = {torch.float32: 1e-6, torch.float64: 1e-9}[asked.dtype] if number % 2 else 0
            expected = (first + share * first.diagonal().mean() * unit).to(asked.dtype)
            if number >= 2:
                expected = first.double() + share * first.double().diagonal().mean() * unit.double()
            # A tenth of the jitter, which is 17 units of float32 rounding at 1.
            assert torch.allclose(asked, expected, rtol=0, atol=1e-7 if asked.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(("dtype", "attempts"), [(torch.float32, 4), (torch.float64, 2)])
def test_no_solver_converges(monkeypatch, dtype, attempts):
    solver = Solver(monkeypatch, ["error", "values", "vectors", "error", "error", "error"])
    with pytest.raises(InputError, match="G of fc: its eigendecomposition does not converge"):
        eigenbasis(example(4), "G of fc", dtype)
    assert len(solver.asked) == attempts


def test_a_jitter_is_never_negative(monkeypatch):
    """The share of |trace| / d: a matrix of negative trace is lifted too."""
    solver = Solver(monkeypatch, ["error"])
    with pytest.raises(InputError, match="eigenvalue"):
        eigenbasis(torch.diag(torch.tensor([-4.0, -2.0])).double())
    lifted = solver.asked[1] - solver.asked[0]
    assert lifted.diagonal().tolist() == pytest.approx([0.75e-9] * 2, rel=1e-6)  # beside 1 only 1e-16 counts


class Elsewhere(torch.Tensor):
    """Says that it lies on no CPU."""

    is_cpu = False


def test_the_cpu_is_tried_last():
    attempts = list(_attempts(example(4).float().as_subclass(Elsewhere)))
    assert [a.dtype for a in attempts] == [torch.float32] * 2 + [torch.float64] * 4
    plain, jittered = attempts[2].as_subclass(torch.Tensor), attempts[3].as_subclass(torch.Tensor)
    assert torch.equal(attempts[4].as_subclass(torch.Tensor), plain)
    assert torch.equal(attempts[5].as_subclass(torch.Tensor), jittered)
    assert not torch.equal(plain, jittered)


class OnMeta(torch.Tensor):
    """Says that it lies on the meta device."""

    device = torch.device("meta")


def test_results_go_to_the_device_of_the_matrix():
    values, vectors = _eigh(example(4).as_subclass(OnMeta), "A of fc")
    assert values.as_subclass(torch.Tensor).is_meta and vectors.as_subclass(torch.Tensor).is_meta
    assert eigenbasis(torch.zeros(3, 3).as_subclass(OnMeta)).vectors.is_meta


def test_the_default_device_plays_no_part():
    matrix = example(4)
    with torch.device("meta"):
        values, vectors = eigenbasis(matrix)
    assert not values.is_meta and not vectors.is_meta


# -- effective rank ----------------------------------------------------------------------------------------


def test_effective_rank_is_the_exponential_of_the_entropy():
    values = torch.rand(7, generator=generator())
    shares = [v / sum(values.double().tolist()) for v in values.double().tolist()]
    assert effective_rank(values) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-14)


def test_effective_rank_of_equal_and_of_no_eigenvalues():
    assert effective_rank(torch.full((5,), 3.0)) == pytest.approx(5, rel=1e-14)
    assert effective_rank(torch.tensor([2.0, 0.0])) == 1
    assert effective_rank(torch.zeros(4)) == 1
    # Shares do not depend on the scale, down to numbers whose sum is close to the smallest there is.
    assert effective_rank(torch.tensor([1e-300, 1e-300], dtype=torch.float64)) == pytest.approx(2, rel=1e-14)
    assert effective_rank(torch.full((3,), 1e38)) == pytest.approx(3, rel=1e-14)  # its sum is no float32 number


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
