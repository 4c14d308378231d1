"""What a collection will need in memory, and how to cut it so that it fits."""

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from lightning_kfac.collection.capture import Trial, Uses
from lightning_kfac.collection.leftovers import without_leftover_gradients
from lightning_kfac.collection.objective import BatchT, Objective
from lightning_kfac.console import counted
from lightning_kfac.distributed.ranks import share_out
from lightning_kfac.distributed.sharding import gathered_bytes, is_spread
from lightning_kfac.errors import InputError
from lightning_kfac.math.covariance import accumulator_numbers, accumulators_on, panel_edges
from lightning_kfac.models.layer import Layer

# Share of the free memory that a plan may use: estimates are estimates.
USABLE = 0.85
# Enough tokens to keep matrix products busy; more only costs memory.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
PROBE_TOKENS = 32
# The widest gradients that live beside what autograd keeps.
WIDEST_AT_ONCE = 6


@dataclass(frozen=True)
class MemoryPlan:
    """How a collection is cut.

    Attributes:
        passes: Layer names collected together, one tuple for each pass over the text.
        rows_at_once: Rows whose activations exist at once.
        head_chunk: Tokens whose logits exist at once; None where the model's own logits are needed.
        factor_bytes: Accumulators of the largest pass on the device of the rank with most of them.
        activation_bytes: Activations of ``rows_at_once`` rows (measured on a few tokens, extrapolated).
        head_bytes: One slice of logits.
        leaders: For each layer the first one that reads the same input.
        changed: Layers whose input the model changes in place afterwards.
        owners: The rank that keeps each layer's accumulators; None where every rank keeps all.
    """

    passes: tuple[tuple[str, ...], ...]
    rows_at_once: int
    head_chunk: int | None
    factor_bytes: int
    activation_bytes: int
    head_bytes: int
    leaders: dict[str, str] = field(default_factory=dict, repr=False)
    owners: dict[str, int] | None = None
    changed: tuple[str, ...] = ()

    @property
    def uses(self) -> Uses:
        """How a forward uses the layers."""
        return Uses(self.leaders, frozenset(self.changed))

    def __str__(self) -> str:
        layers = sum(map(len, self.passes))
        passes = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        return (
            f"{layers} projection{'s' * (layers != 1)}, {passes}, {readable_bytes(self.factor_bytes)} of factors"
            f"{' on each rank' if self.owners is not None else ''}, "
            f"{readable_bytes(self.activation_bytes)} of activations ({counted(self.rows_at_once, 'row')} at once), "
            f"{readable_bytes(self.head_bytes)} of logits"
        )


def plan_memory(
    model: nn.Module,
    layers: Mapping[str, Layer],
    objective: Objective[BatchT],
    rows: int,
    seq_len: int,
    max_memory_gb: float | None = None,
    layers_per_pass: int | None = None,
    processes: int = 1,
    owning_ranks: int | None = None,
    coupled: bool = False,
) -> MemoryPlan:
    """Chooses passes, rows at once and head chunk before the first batch.

    Args:
        model: Already on its device; weights are in memory, so only what comes on top counts.
        layers: The tracked layers by name.
        objective: What will be differentiated.
        rows, seq_len: Shape of a full batch.
        max_memory_gb: Cap on what comes on top, in GB (10^9 bytes); by default 85 % of what is free.
        layers_per_pass: Fixes the number of projections a pass, as the original tool does.
        processes: How many processes of this machine collect; on a CPU they share its memory.
        owning_ranks: The accumulators are spread over so many ranks; by default each rank keeps all.
        coupled: Each layer has two more, which no two share.

    Raises:
        InputError: Not even one row and one projection a pass fit (says what would), or a layer is in
            float16.
    """
    for name, layer in layers.items():
        if layer.dtype == torch.float16:
            raise InputError(f"{name} is in float16, whose gradients overflow; load the model in bfloat16 or float32")
    device = next(iter(layers.values())).device
    budget = USABLE * free_memory(device) / (processes if device.type == "cpu" else 1) - gathered_bytes(model)
    budget = int(budget if max_memory_gb is None else max_memory_gb * 1e9)
    chunk, head_bytes = objective.head(model, layers, device, rows * seq_len)
    row_bytes, uses = _try_out(model, layers, objective, chunk, seq_len)
    leaders = dict(uses.leaders)
    ranks = owning_ranks or 1
    size = partial(_factor_bytes, layers, leaders, ranks=ranks, coupled=coupled)
    room = budget - head_bytes
    cut = cut_collection(list(layers), size, room, row_bytes, rows, seq_len, device.type, layers_per_pass)
    factor_bytes = int(cut.factor_bytes)
    if factor_bytes > room - row_bytes:
        needed = factor_bytes + head_bytes + row_bytes
        raise InputError(
            f"the collection does not fit into {readable_bytes(budget)}: with one row at once and "
            f"{layers_per_pass or 1} projections a pass it needs {readable_bytes(needed)}; "
            "free memory, raise max_memory_gb, shorten the rows or choose fewer layers"
        )
    owners = {n: r for names in cut.passes for n, r in _owners(layers, leaders, names, ranks, coupled).items()}
    return MemoryPlan(
        cut.passes,
        cut.rows_at_once,
        chunk,
        factor_bytes,
        row_bytes * cut.rows_at_once,
        head_bytes,
        leaders,
        owners if owning_ranks else None,
        tuple(uses.changed),
    )


class Cut(NamedTuple):
    """How a collection is cut.

    Attributes:
        passes: Names of the layers of each pass.
        factor_bytes: Accumulators of the largest.
        rows_at_once: Rows whose activations exist at once.
    """

    passes: tuple[tuple[str, ...], ...]
    factor_bytes: float
    rows_at_once: int


def cut_collection(
    names: Sequence[str],
    size: Callable[[Sequence[str]], float],
    room: float,
    row_bytes: float,
    rows: int,
    seq_len: int,
    kind: str,
    layers_per_pass: int | None = None,
) -> Cut:
    """As few passes as fit beside one row, then as many rows at once as fit beside the accumulators.

    Args:
        names: Of the tracked layers.
        size: Bytes of the accumulators of some of them.
        room: Bytes for accumulators and activations.
        row_bytes: Activations of one row.
        rows, seq_len: Shape of a batch.
        kind: Of the device: ``cpu`` or ``cuda``.
        layers_per_pass: Fixes the number of projections a pass.
    """
    passes = cut_passes(names, size, room - row_bytes, layers_per_pass)
    factor_bytes = max(map(size, passes))
    fitting = (room - factor_bytes) // max(row_bytes, 1)
    useful = -(-TOKENS_AT_ONCE.get(kind, TOKENS_AT_ONCE["cuda"]) // seq_len)
    return Cut(passes, factor_bytes, int(max(1, min(rows, useful, fitting))))


def cut_passes(
    names: Sequence[str], size: Callable[[Sequence[str]], float], budget: float, layers_per_pass: int | None = None
) -> tuple[tuple[str, ...], ...]:
    """Passes over the layers in model order; without a fixed number, as few as fit the budget.

    Args:
        names: Of the tracked layers.
        size: Bytes of the accumulators of some of them.
        budget: Bytes that a pass may have; a layer that does not fit alone is a pass all the same.
        layers_per_pass: Fixes the number of projections a pass.
    """
    if layers_per_pass is not None:
        if layers_per_pass < 1:
            raise InputError(f"collect.layers_per_pass is {layers_per_pass}; it must be at least 1")
        return tuple(tuple(names[i : i + layers_per_pass]) for i in range(0, len(names), layers_per_pass))
    passes: list[tuple[str, ...]] = []
    first = 0
    while first < len(names):
        ends = range(first + 2, len(names) + 1)
        last = first + 1 + bisect_right(ends, budget, key=lambda end: size(names[first:end]))
        passes.append(tuple(names[first:last]))
        first = last
    return tuple(passes)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        # What torch has taken from the device and holds in reserve is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _try_out(
    model: nn.Module, layers: Mapping[str, Layer], objective: Objective[BatchT], chunk: int | None, seq_len: int
) -> tuple[int, Uses]:
    """Bytes that autograd keeps for one row, and how a forward uses the layers, from a run on a few tokens."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters() if not is_spread(p)}
    kept: dict[int, UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    first = next(iter(layers.values()))
    tokens = max(2, min(PROBE_TOKENS, seq_len))
    batch = objective.trial(tokens, first.device)
    with (
        without_leftover_gradients(model),
        Trial(layers) as trial,
        torch.enable_grad(),
    ):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = next(iter(objective.draws(model, batch, chunk)))
        uses = trial.uses()
    del loss
    if missing := [name for name in layers if name not in uses.leaders]:
        raise InputError(f"{missing[0]} was not run in a trial on {tokens} tokens (is it an expert?); leave it out")
    widest = max(max(layer.shape) for layer in layers.values())
    transient = WIDEST_AT_ONCE * widest * first.parameter.element_size()
    # Weights of a sharded model that were put together for the forward are empty again.
    row_bytes = sum(storage.nbytes() for storage in kept.values())
    return (row_bytes // (tokens - 1) + transient) * seq_len, uses


def _numbers(
    layers: Mapping[str, Layer], leaders: Mapping[str, str], names: Collection[str], coupled: bool
) -> dict[str, int]:
    """How many numbers the accumulators of each layer of a pass hold."""
    numbers: dict[str, int] = {}
    inputs: set[str] = set()
    for name in names:
        d_out, d_in = layers[name].shape
        numbers[name] = accumulator_numbers(d_out)
        if coupled:
            numbers[name] += accumulator_numbers(d_out) + accumulator_numbers(d_in)
        if leaders[name] not in inputs:
            inputs.add(leaders[name])
            numbers[name] += accumulator_numbers(d_in)
    return numbers


def _owners(
    layers: Mapping[str, Layer], leaders: Mapping[str, str], names: Collection[str], ranks: int, coupled: bool
) -> dict[str, int]:
    """The rank that keeps each layer of a pass; layers that share an input have one."""
    return share_out(_numbers(layers, leaders, names, coupled), leaders, ranks)


def _factor_bytes(
    layers: Mapping[str, Layer], leaders: Mapping[str, str], names: Collection[str], ranks: int, coupled: bool
) -> int:
    """Bytes of the accumulators of one pass, on the rank with most of them; and of a panel on its way to its owner."""
    owners = _owners(layers, leaders, names, ranks, coupled)
    loads = [0] * ranks
    for name, numbers in _numbers(layers, leaders, names, coupled).items():
        loads[owners[name]] += numbers
    widest = max(max(layers[name].shape) for name in names)
    panel = widest * max(last - first for first, last in panel_edges(widest)) if ranks > 1 else 0
    kind = next(iter(layers.values())).device.type
    return 4 * (max(loads) * accumulators_on(kind) // 2 + panel)


def readable_bytes(number: float) -> str:
    """``2.5e9`` -> ``2.5 GB``."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
