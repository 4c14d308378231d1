"""What a collection and an edit cost, on paper: FLOPs a token, bytes, and numbers that travel between ranks.

A decoder is a list of matrix products z = W a, in the order of the data: block after block, and in a block first
q, k and v, then o, then gate and up, then down. Only products of matrices are counted; element-wise work and the
drawing of labels are left to the efficiency with which a machine is said to reach its peak.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_kfac.math.covariance import accumulator_numbers, accumulators_on

# Stages of a block.
QKV, OUT, GATE_UP, DOWN = range(4)
# Forward has two products, q k^T and p v; backward has five, as p is computed again (Dao, 2023).
ATTENTION_BACKWARD = 2.5
# Symmetric QR with eigenvectors (Golub and Van Loan, Matrix Computations, section 8.3).
EIGEN_FLOPS = 9


@dataclass(frozen=True)
class Product:
    """A weight [d_out, d_in] that multiplies every token, or a stack of such, one an expert.

    Attributes:
        name: Dotted name of the module (of the parameter, for experts).
        block: Number of the block; that of the head is the number of blocks.
        stage: Place in the block.
        copies: Number of experts.
        used: Of them, how many see a token.
        expert: Its number, for a single expert's weight.
        share: Of the tokens, that come to it.
        shared: Whether it is of an expert that every token goes through, beside those that a router chooses.
        coupled: Whether coupled factors are collected of it too.
    """

    name: str
    d_out: int
    d_in: int
    block: int
    stage: int
    copies: int = 1
    used: int = 1
    expert: int | None = None
    share: float = 1.0
    shared: bool = False
    coupled: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Later products have a larger place."""
        return self.block, self.stage

    @property
    def group(self) -> tuple[int, int, int | None]:
        """Products of one group read the same input."""
        return self.block, self.stage, self.expert

    @property
    def flops(self) -> int:
        """Of one token, forward; the gradient with respect to the input costs the same."""
        return 2 * self.d_out * self.d_in * self.used


@dataclass(frozen=True)
class Architecture:
    """A decoder-only language model.

    Attributes:
        products: All matrix products, the head last.
        blocks: Number of blocks.
        heads_width: Heads times their width.
        vocabulary: Number of logits.
        gated: Whether the MLP has a gate beside up.
        norm_width: Numbers that the norms of one block read for a token.
        parameters: Numbers in all weights.
        block_parameters: Of the largest block.
        root_parameters: Outside the blocks: embedding, head, last norm.
        parts: Of the products, what can be tracked apart: fused rows, and single experts.
    """

    products: tuple[Product, ...]
    blocks: int
    heads_width: int
    vocabulary: int
    gated: bool
    norm_width: int
    parameters: int
    block_parameters: int
    root_parameters: int
    parts: tuple[Product, ...] = ()

    def select(self, names: Iterable[str]) -> list[Product]:
        """The products and parts of these names, in the order of the data."""
        chosen = set(names)
        found = [product for product in (*self.products, *self.parts) if product.name in chosen]
        return sorted(found, key=lambda product: product.place)


class TokenFlops(NamedTuple):
    """FLOPs of one token."""

    forward: float
    backward: float
    covariance: float


def token_flops(model: Architecture, tracked: Sequence[Product], seq_len: int) -> TokenFlops:
    """FLOPs of one token in one pass.

    Forward is the whole model with the head, and causal attention, half of the square. Backward has activation
    gradients only, from the head down to the lowest tracked output. A covariance sums the panels of its upper
    triangle: 2 FLOPs for each number of one of the two accumulators.
    """
    attention = 2 * 2 * model.heads_width * seq_len / 2
    lowest = min(product.place for product in tracked)
    paths = {product.shared for product in tracked if product.place == lowest}
    # In a block shared and routed experts run side by side: one is not behind the other.
    beside = (lowest[0], DOWN) if lowest[1] == GATE_UP else None
    behind = [p for p in model.products if p.place > lowest and (p.place != beside or p.shared in paths)]
    return TokenFlops(
        sum(product.flops for product in model.products) + model.blocks * attention,
        sum(product.flops for product in behind) + _attended_again(model, lowest) * ATTENTION_BACKWARD * attention,
        covariance_flops(tracked),
    )


def covariance_flops(tracked: Iterable[Product]) -> float:
    """FLOPs of one token; an expert sees only some of the tokens, on average as many as each other one."""
    groups: dict[float, list[Product]] = {}
    for product in tracked:
        groups.setdefault(product.share, []).append(product)
    return sum(share * sum(map(accumulator_numbers, factor_sizes(group))) for share, group in groups.items())


def _attended_again(model: Architecture, lowest: tuple[int, int]) -> int:
    """Blocks whose attention is differentiated."""
    return model.blocks - lowest[0] - (lowest[1] > QKV)


def matrix_sizes(tracked: Iterable[Product]) -> list[int]:
    """Sizes of A and G: a G for each layer and an A for each input, which layers of one stage share."""
    tracked = list(tracked)
    inputs = {(p.group, p.d_in) for p in tracked}
    return [p.d_out for p in tracked] + [size for _, size in inputs]


def factor_sizes(tracked: Iterable[Product]) -> list[int]:
    """The same with the coupled factors, which no two layers share."""
    tracked = list(tracked)
    coupled = [size for p in tracked if p.coupled for size in (p.d_out, p.d_in)]
    return matrix_sizes(tracked) + coupled


def owner_groups(tracked: Iterable[Product]) -> list[list[Product]]:
    """Layers that have one owner, because they share an A."""
    groups: dict[tuple[int, int, int | None], list[Product]] = {}
    for product in tracked:
        groups.setdefault(product.group, []).append(product)
    return list(groups.values())


def largest_share(costs: Iterable[float], ranks: int) -> float:
    """What the busiest rank has where the dearest group next always goes to the rank with the least.

    Example:
        >>> largest_share([3, 2, 2, 1], 2), largest_share([3, 2], 8)
        (4.0, 3.0)
    """
    ordered = sorted(costs, reverse=True)
    loads = [0.0] * min(ranks, len(ordered))
    for cost in ordered:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def accumulator_bytes(tracked: Iterable[Product]) -> int:
    """Both float32 accumulators of every factor."""
    return 4 * sum(map(accumulator_numbers, factor_sizes(tracked)))


def resident_bytes(tracked: Iterable[Product], kind: str) -> int:
    """Of these what lies on a device of a kind (``cpu``, ``cuda``)."""
    return accumulator_bytes(tracked) * accumulators_on(kind) // 2


def triangle_bytes(tracked: Iterable[Product]) -> int:
    """Packed float32 triangles: what travels between ranks, and what lies in a factor folder."""
    return 4 * sum(d * (d + 1) // 2 for d in factor_sizes(tracked))


def square_bytes(tracked: Iterable[Product]) -> int:
    """Factors as full float32 squares, as they are in host memory once collected."""
    return 4 * sum(d * d for d in factor_sizes(tracked))


def basis_bytes(tracked: Iterable[Product]) -> int:
    """Eigenvectors and eigenvalues in float64, kept beside the factors."""
    return 8 * sum(d * d + d for d in matrix_sizes(tracked))


def activation_bytes(model: Architecture, tracked: Sequence[Product], element: int) -> int:
    """What autograd keeps of one token, from the lowest tracked output up.

    Products with frozen weights keep nothing. Kept are q, k, v and the output of attention; the outputs of gate and
    up and the activation between them (4 values a neuron for GPT-2's GELU); a float32 copy of every norm's input;
    the tracked inputs, and the gradient at the last hidden state.

    Args:
        element: Bytes of one number of the weights.
    """
    lowest = min(product.place for product in tracked)
    hidden = model.products[-1].d_in
    numbers: float = hidden + sum({(p.group, p.d_in): p.d_in * p.share for p in tracked}.values())
    for p in model.products[:-1]:
        if p.stage == QKV and p.place >= lowest:
            numbers += p.d_out
        elif p.stage == OUT and p.place > lowest:
            numbers += p.d_in
        elif p.stage == GATE_UP and p.place >= lowest:
            numbers += p.used * p.d_out * (1.5 if model.gated else 4)
        elif p.copies > 1 and p.place >= lowest:
            numbers += p.used * p.d_out  # each expert's output, before they are weighted
    norms = model.norm_width * _attended_again(model, lowest) + hidden
    return int(element * numbers) + 4 * norms


def eigen_flops(tracked: Iterable[Product]) -> int:
    """Of the eigendecompositions of all factors."""
    return EIGEN_FLOPS * sum(d**3 for d in matrix_sizes(tracked))


def edit_flops(tracked: Iterable[Product]) -> int:
    """Of U_G^T W U_A and the way back, for every layer."""
    return sum(4 * p.d_out * p.d_in * (p.d_out + p.d_in) for p in tracked)


def edit_bytes(layer: Product) -> int:
    """Memory of a layer's edit in float64: a matrix, its eigenvectors and the solver's work beside both bases, and
    the weight three times.
    """
    return 8 * (3 * max(layer.d_out, layer.d_in) ** 2 + layer.d_out**2 + layer.d_in**2 + 3 * layer.d_out * layer.d_in)


def all_reduce_bytes(n_bytes: float, ranks: int) -> float:
    """What each rank sends in a ring all-reduce: reduce-scatter, then all-gather."""
    return 2 * n_bytes * (ranks - 1) / ranks


def all_gather_bytes(n_bytes: float, ranks: int) -> float:
    """What each rank receives so that all have ``n_bytes`` of which each held a part."""
    return n_bytes * (ranks - 1) / ranks
