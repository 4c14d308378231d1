"""What is summed over the batches at one layer."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.math.spectrum import Spectrum
from lightning_kfac.models.layer import Layer

ResultT = TypeVar("ResultT")


class Moment(Protocol):
    """A running sum of X^T X, see ``SecondMoment``; it may be kept by another process."""

    @property
    def here(self) -> bool:
        """Whether this process keeps the sum."""

    def add(self, x: Tensor) -> None:
        """Adds ``x^T x`` for x [n, d]."""

    def sum(self) -> Tensor:
        """The symmetric sum, float32 [d, d]."""

    def packed(self) -> Tensor:
        """Upper triangle of the sum as a vector [d (d + 1) / 2]."""

    def load_packed(self, packed: Tensor) -> None:
        """Replaces the sum."""

    def state(self) -> dict[str, Tensor]:
        """What ``load_state`` needs to go on bit for bit."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what ``state`` gave."""

    def trace(self) -> Tensor:
        """Trace of the sum, a scalar tensor."""


class LayerSums(Protocol[ResultT]):
    """What is summed over the batches at one layer, and what is made of it at the end."""

    def share_input(self) -> None:
        """The layer reads the same input as an earlier one, which sums it for both."""

    def add(self, a: Tensor, g: Tensor, first_draw: bool, rows: Tensor | None = None) -> None:
        """Adds one batch: a [B, T, d_in], g [B, T, d_out], zero at positions that do not count.

        Args:
            first_draw: False where only g is new: another draw of labels on the same forward pass.
            rows: int64 [n], where a is [n, d_in], of some positions only: in which row of the batch each is.
        """

    def tensors(self) -> list[Tensor]:
        """The sums as vectors, to be added over ranks."""

    def load(self, tensors: list[Tensor]) -> None:
        """Takes back what ``tensors`` gave."""

    def state(self) -> dict[str, Tensor]:
        """What ``load_state`` needs to go on bit for bit: more than the sums, where these are kept in parts."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what ``state`` gave."""

    def trace(self) -> dict[str, Tensor]:
        """Scalars that are finite only while everything that was added was: of the input, of the gradient."""

    def result(self, n_tokens: int, draws: int, leader: ResultT | None) -> ResultT:
        """Means over what was added; the sums are used up.

        Args:
            n_tokens: Positions that counted.
            draws: Gradients a position.
            leader: The result of the layer that summed the shared input; None where this one did.
        """


class FactorSums(LayerSums[KroneckerFactors]):
    """The sums of A and G. A layer that reads the same input as another has no A of its own.

    Args:
        moment: Makes a running sum from a size and a device.
        coupled: Also sum ||g||^2 a a^T and ||a||^2 g g^T, which no two layers share.
    """

    def __init__(
        self, layer: Layer, moment: Callable[[int, torch.device], Moment] = SecondMoment, coupled: bool = False
    ):
        d_out, d_in = layer.shape
        self.G = moment(d_out, layer.device)
        self.A: Moment | None = moment(d_in, layer.device)
        self.coupled = (moment(d_out, layer.device), moment(d_in, layer.device)) if coupled else None

    @override
    def share_input(self) -> None:
        self.A = None

    @override
    def add(self, a: Tensor, g: Tensor, first_draw: bool, rows: Tensor | None = None) -> None:
        self.G.add(g.flatten(0, -2))
        if first_draw and self.A is not None:
            self.A.add(a.flatten(0, -2))
        if self.coupled is not None:
            by_output, by_input = self.coupled
            by_output.add(weighted(g, a))
            by_input.add(weighted(a, g))

    @override
    def tensors(self) -> list[Tensor]:
        return [moment.packed() for moment in self._here()]

    @override
    def load(self, tensors: list[Tensor]) -> None:
        for moment, tensor in zip(self._here(), tensors, strict=True):
            moment.load_packed(tensor)

    @override
    def state(self) -> dict[str, Tensor]:
        moments = {side: moment for side, moment in self._sides() if moment.here}
        return {f"{side}.{key}": value for side, moment in moments.items() for key, value in moment.state().items()}

    @override
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for side, moment in self._sides():
            if moment.here:
                moment.load_state({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{side}.")})

    @override
    def trace(self) -> dict[str, Tensor]:
        gradient = self.G.trace() if self.coupled is None else self.G.trace() + self.coupled[0].trace()
        return {"gradient": gradient} | ({"input": self.A.trace()} if self.A is not None else {})

    @override
    def result(self, n_tokens: int, draws: int, leader: KroneckerFactors | None) -> KroneckerFactors:
        """A and G in host memory, zero where nothing came; layers that share an input share the tensor A."""
        A = self._mean_input(n_tokens) if leader is None else leader.A
        self.A = None
        count = draws * max(n_tokens, 1)
        G = _on_host(self.G.sum().div_(count))
        if self.coupled is None:
            return KroneckerFactors(A, G, n_tokens)
        G_coupled, A_coupled = (_on_host(moment.sum().div_(count)) for moment in self.coupled)
        self.coupled = None
        return KroneckerFactors(A, G, n_tokens, A_coupled, G_coupled)

    def _mean_input(self, n_tokens: int) -> Tensor:
        if self.A is None:
            raise RuntimeError("the layer shares its input: its A is in the result of the layer that leads")
        return _on_host(self.A.sum().div_(max(n_tokens, 1)))

    def _here(self) -> list[Moment]:
        """The sums that this process keeps."""
        return [moment for _, moment in self._sides() if moment.here]

    def _sides(self) -> list[tuple[str, Moment]]:
        sides = [("G", self.G)] if self.A is None else [("G", self.G), ("A", self.A)]
        if self.coupled is not None:
            sides += zip(("G_coupled", "A_coupled"), self.coupled, strict=True)
        return sides


def _on_host(tensor: Tensor) -> Tensor:
    """Whole squares take twice the device memory of the triangles that they come from."""
    return tensor if tensor.is_meta else tensor.cpu()


def weighted(x: Tensor, by: Tensor) -> Tensor:
    """Each vector of x [..., d] times the length of the vector beside it, flattened. float32 [n, d]."""
    return (x.float() * by.float().norm(dim=-1, keepdim=True)).flatten(0, -2)


class MomentSums(LayerSums[Tensor]):
    """Second moments of the gradient in the curvature basis (EK-FAC: George et al., 2018).

    Args:
        G, A: Eigenbases of the layer's factors.
        moments: ``token`` sums (U_G^T g_t)^2 (U_A^T a_t)^2^T over positions; ``sequence`` squares the
            gradient of each row, summed over its positions.
    """

    def __init__(self, layer: Layer, G: Spectrum, A: Spectrum, moments: str):
        self.U_G = G.vectors.float().to(layer.device)
        self.U_A = A.vectors.float().to(layer.device)
        self.per_row = moments == "sequence"
        self.total = torch.zeros(layer.shape, device=layer.device)

    @override
    def share_input(self) -> None:
        """Its moments are its own."""

    @override
    def add(self, a: Tensor, g: Tensor, first_draw: bool, rows: Tensor | None = None) -> None:
        a = a.float() @ self.U_A
        g = g.float() @ self.U_G
        if self.per_row and rows is not None:
            for row in rows.unique():
                self.total += (g[rows == row].T @ a[rows == row]) ** 2
        elif self.per_row:
            for a_row, g_row in zip(a, g, strict=True):
                self.total += (g_row.T @ a_row) ** 2
        else:
            self.total.addmm_((g**2).flatten(0, -2).T, (a**2).flatten(0, -2))

    @override
    def tensors(self) -> list[Tensor]:
        return [self.total]

    @override
    def load(self, tensors: list[Tensor]) -> None:
        (self.total,) = tensors

    @override
    def state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    @override
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.total.copy_(state["total"])

    @override
    def trace(self) -> dict[str, Tensor]:
        return {"gradient": self.total.sum()}

    @override
    def result(self, n_tokens: int, draws: int, leader: Tensor | None) -> Tensor:
        """The mean moments [d_out, d_in]."""
        return self.total / (draws * max(n_tokens, 1))


class NoSums(LayerSums[None]):
    """Sums nothing: for a trial run."""

    @override
    def share_input(self) -> None:
        pass

    @override
    def add(self, a: Tensor, g: Tensor, first_draw: bool, rows: Tensor | None = None) -> None:
        pass

    @override
    def tensors(self) -> list[Tensor]:
        return []

    @override
    def load(self, tensors: list[Tensor]) -> None:
        pass

    @override
    def state(self) -> dict[str, Tensor]:
        return {}

    @override
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    @override
    def trace(self) -> dict[str, Tensor]:
        return {}

    @override
    def result(self, n_tokens: int, draws: int, leader: None) -> None:
        pass
