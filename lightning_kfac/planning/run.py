"""A run on paper: does it fit, how long does it take, what does it write. The arithmetic is in cost.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_kfac.collection.fisher import slice_of_logits
from lightning_kfac.collection.memory import (
    USABLE,
    WIDEST_AT_ONCE,
    cut_collection,
)
from lightning_kfac.errors import InputError
from lightning_kfac.math.covariance import panel_edges
from lightning_kfac.planning import cost
from lightning_kfac.planning.cost import Architecture, Product
from lightning_kfac.planning.hardware import Hardware, Strategy

# Share of a link's rate that collectives of large messages reach: an assumption.
LINK_EFFICIENCY = 0.8
# Resume states that are kept.
STATES_KEPT = 2
# FSDP2 gathers a block while the one before it computes.
BLOCKS_GATHERED = 2
MOST_DEVICES = 4096


@dataclass(frozen=True)
class Job:
    """What is collected.

    Attributes:
        tracked: The layers.
        tokens: Of text, over all ranks.
        seq_len, rows: Shape of the batch of one rank.
        element: Bytes of one number of the weights: 2 for bfloat16, 4 for float32.
        most_memory: Cap on bytes beside the weights while collecting; by default 85 % of what they leave.
        layers_per_pass: Fixes the number of projections a pass.
    """

    tracked: tuple[Product, ...]
    tokens: int
    seq_len: int = 512
    rows: int = 8
    element: int = 2
    most_memory: float | None = None
    layers_per_pass: int | None = None


@dataclass(frozen=True)
class RunPlan:
    """A run as computed.

    Attributes:
        strategy: ``ddp``, ``fsdp``, or ``auto`` on one device.
        ranks: Number of devices.
        passes: Names of the layers that are collected together, for each pass over the text.
        rows_at_once: Rows whose activations exist at once.
        steps: Forward passes of one rank in one pass.
        flops: Of one token, all passes together.
        memory: Bytes of one rank while it collects, by part.
        edit_memory: Bytes of one rank while it decomposes and edits the largest layer.
        capacity: Bytes that may be used while collecting.
        edit_capacity: The same while editing, which a cap on the collection leaves alone.
        seconds: By part; nothing overlaps.
        disk: Bytes, by part.
        host_memory: Bytes of CPU memory that one node needs for weights and factors.
    """

    strategy: str
    ranks: int
    passes: tuple[tuple[str, ...], ...]
    rows_at_once: int
    steps: int
    flops: cost.TokenFlops
    memory: dict[str, float]
    edit_memory: float
    capacity: float
    edit_capacity: float
    seconds: dict[str, float]
    disk: dict[str, float]
    host_memory: float

    @property
    def fits(self) -> bool:
        """Whether one rank's memory is enough."""
        return sum(self.memory.values()) <= self.capacity and self.edit_memory <= self.edit_capacity

    @property
    def total_seconds(self) -> float:
        """Of collection, eigenbases and edit."""
        return sum(self.seconds.values())

    @property
    def communication_share(self) -> float:
        """Of the time of the collection."""
        collection = [self.seconds[part] for part in ("forward", "backward", "covariances", "communication")]
        return collection[-1] / sum(collection)


def plan_run(
    model: Architecture, job: Job, hardware: Hardware, ranks: int, per_node: int, strategy: Strategy = "auto"
) -> RunPlan:
    """The plan of a run; ``auto`` takes the fastest strategy that fits.

    Args:
        ranks: Devices in all.
        per_node: Devices of one node.

    Raises:
        InputError: A number is not positive, or fsdp is asked for on one device.
    """
    positive = {"tokens": job.tokens, "seq_len": job.seq_len, "batch_size": job.rows, "devices": ranks}
    for name, number in positive.items():
        if number < 1:
            raise InputError(f"{name} is {number}; it must be at least 1", name)
    if ranks == 1:
        if strategy == "fsdp":
            raise InputError("strategy fsdp needs several devices: nothing is sharded on one", "strategy")
        return _plan(model, job, hardware, 1, 1, "auto")
    if strategy != "auto":
        return _plan(model, job, hardware, ranks, per_node, strategy)
    plans = [_plan(model, job, hardware, ranks, per_node, one) for one in ("ddp", "fsdp")]
    return min((plan for plan in plans if plan.fits), key=lambda plan: plan.total_seconds, default=plans[-1])


def fewest_devices(model: Architecture, job: Job, hardware: Hardware) -> int | None:
    """The smallest power of two of devices on which the job fits; None where 4,096 are too few."""
    ranks = 1
    while ranks <= MOST_DEVICES:
        if plan_run(model, job, hardware, ranks, min(ranks, hardware.per_node)).fits:
            return ranks
        ranks *= 2
    return None


class _Cut(NamedTuple):
    """How one rank goes through the text, and the bytes that this takes: by part, and what may be used.

    Attributes:
        passes: Layers that are collected together, for each pass.
        batch: Rows of a batch.
        rows: Of them at once.
        memory: Bytes by part.
        capacity: That may be used while collecting.
        usable: That may be used at all.
    """

    passes: tuple[tuple[str, ...], ...]
    batch: int
    rows: int
    memory: dict[str, float]
    capacity: float
    usable: float


def _plan(model: Architecture, job: Job, hardware: Hardware, ranks: int, per_node: int, strategy: str) -> RunPlan:
    sharded = strategy == "fsdp"
    cut = _cut(model, job, hardware, ranks, sharded)
    tokens = cut.batch * job.seq_len
    batches = math.ceil(job.tokens / (ranks * tokens))
    steps = batches * math.ceil(cut.batch / cut.rows)
    by_name = {product.name: product for product in job.tracked}
    collected = [[by_name[name] for name in names] for names in cut.passes]
    each = [cost.token_flops(model, products, job.seq_len) for products in collected]
    flops = cost.TokenFlops(*map(sum, zip(*each, strict=True)))
    if sharded:
        sent = sum(_sent(model, job, products, ranks, steps) for products in collected)
    else:
        sent = cost.all_reduce_bytes(sum(map(cost.triangle_bytes, collected)), ranks)
    link = hardware.within if ranks <= per_node else min(hardware.within, per_node * hardware.between)
    token_seconds = batches * tokens / (hardware.flops * hardware.efficiency)
    groups = cost.owner_groups(job.tracked)
    seconds = {
        "forward": flops.forward * token_seconds,
        "backward": flops.backward * token_seconds,
        "covariances": flops.covariance * token_seconds,
        "communication": sent / (link * LINK_EFFICIENCY),
        "eigenbases": cost.largest_share(map(cost.eigen_flops, groups), ranks) / hardware.eigen,
        "edit": cost.largest_share(map(cost.edit_flops, groups), ranks) / hardware.eigen,
    }
    return RunPlan(
        strategy=strategy,
        ranks=ranks,
        passes=cut.passes,
        rows_at_once=cut.rows,
        steps=steps,
        flops=flops,
        memory=cut.memory,
        edit_memory=cut.memory["weights"] + max(map(cost.edit_bytes, job.tracked)),
        capacity=cut.capacity,
        edit_capacity=cut.usable,
        seconds=seconds,
        disk=_disk(model, job, collected, copies=1 if sharded else ranks),
        host_memory=_host_memory(model, job, ranks, min(ranks, per_node), sharded),
    )


def _cut(model: Architecture, job: Job, hardware: Hardware, ranks: int, sharded: bool) -> _Cut:
    """As plan_memory cuts it: as few passes as fit, then as many rows at once as fit beside them."""
    by_name = {product.name: product for product in job.tracked}

    def factor_bytes(names: Sequence[str]) -> float:
        chosen = [by_name[name] for name in names]
        groups = cost.owner_groups(chosen) if sharded else [chosen]
        return cost.largest_share((cost.resident_bytes(group, hardware.kind) for group in groups), ranks)

    memory = _weights(model, job, ranks, sharded)
    resident = sum(memory.values())
    usable = resident + USABLE * (hardware.memory - resident) if resident < hardware.memory else hardware.memory
    capacity = usable if job.most_memory is None else min(resident + job.most_memory, hardware.memory)
    batch = min(job.rows, math.ceil(job.tokens / (ranks * job.seq_len)))  # the text may have less for a rank
    _, memory["logits"] = slice_of_logits(hardware.kind, model.vocabulary, batch * job.seq_len)
    widest = max(max(p.d_out, p.d_in) for p in job.tracked)
    activations = cost.activation_bytes(model, job.tracked, job.element)
    row = (activations + WIDEST_AT_ONCE * widest * job.element) * job.seq_len
    left = capacity - sum(memory.values())
    cut = cut_collection(list(by_name), factor_bytes, left, row, batch, job.seq_len, hardware.kind, job.layers_per_pass)
    memory["accumulators"] = cut.factor_bytes
    memory["activations"] = cut.rows_at_once * row
    return _Cut(cut.passes, batch, cut.rows_at_once, memory, capacity, usable)


def _disk(model: Architecture, job: Job, collected: list[list[Product]], copies: int) -> dict[str, float]:
    """Bytes by part.

    Args:
        collected: The layers of each pass.
        copies: How many ranks write the accumulators of all layers.
    """
    return {
        "factors": cost.triangle_bytes(job.tracked),
        "eigenbases": cost.basis_bytes(job.tracked),
        "edited model": job.element * model.parameters,
        "resume states": STATES_KEPT * max(map(cost.accumulator_bytes, collected)) * copies,
    }


def _weights(model: Architecture, job: Job, ranks: int, sharded: bool) -> dict[str, float]:
    """Bytes that are there before a collection begins, and what a sharded one has in hand beside them."""
    if not sharded:
        return {"weights": job.element * model.parameters}
    blocks = model.parameters - model.root_parameters
    largest = max(cost.matrix_sizes(job.tracked))
    # Embedding and head are whole on every rank. A covariance is sent one panel of columns at a time.
    panel = 4 * largest * max(last - first for first, last in panel_edges(largest))
    return {
        "weights": job.element * (model.root_parameters + blocks / ranks),
        "gathered weights": job.element * BLOCKS_GATHERED * model.block_parameters,
        "covariance to send": panel,
    }


def _host_memory(model: Architecture, job: Job, ranks: int, on_node: int, sharded: bool) -> float:
    """Bytes of one node (fsdp: of the first). Each rank loads the checkpoint, and later keeps all factors."""
    weights = job.element * model.parameters
    factors = cost.square_bytes(job.tracked)
    if not sharded:
        return on_node * max(weights, factors)
    share = cost.largest_share(map(cost.square_bytes, cost.owner_groups(job.tracked)), ranks)
    return weights + min(on_node * share, factors)  # only rank 0 loads; each keeps what it owns


def _sent(model: Architecture, job: Job, tracked: list[Product], ranks: int, steps: int) -> float:
    """Bytes of one rank in one pass of a sharded collection: weights to it, covariances to their owners."""
    blocks = model.parameters - model.root_parameters
    again = blocks / model.blocks * (model.blocks - min(p.block for p in tracked))
    weights = cost.all_gather_bytes(job.element * (blocks + again), ranks)
    return steps * (weights + cost.accumulator_bytes(tracked) / 2)  # one accumulator's panels
