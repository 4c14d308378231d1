"""Sharing out work on layers over the processes (ranks) of a distributed run."""

from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_kfac.errors import InputError

T = TypeVar("T")


class Ranks:
    """One process, which owns every layer. ``DistributedRanks`` are several.

    Attributes:
        rank: This process.
        size: Number of processes.

    Example:
        >>> Ranks().gather("done")
        ['done']
    """

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank. Small objects; all ranks must call it."""
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Fills a contiguous tensor with the owner's values, in place, and gives it back."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set; all ranks must call it."""
        return flag

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Adds up a contiguous tensor over ranks, in place; only the owner's holds the sum afterwards."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends a tensor to one rank, which must ``receive`` it."""

    def receive(self, size: int, owner: int) -> Tensor:
        """The float32 vector of so many numbers that one rank sends."""
        raise RuntimeError("one process has nobody to receive from")

    def raise_together(self, error: BaseException | None) -> None:
        """Raises on every rank where one or more have an error, so that none waits for a rank that is gone.

        Raises:
            InputError: One rank's error is one; the same on all ranks.
            RuntimeError: Any other error of another rank.
        """
        first = next(((r, e) for r, e in enumerate(self.gather(_portable(error))) if e is not None), None)
        if first is None:
            return
        rank, (is_input, text) = first
        if error is not None and (rank == self.rank or not is_input):
            raise error
        raise InputError(text) if is_input else RuntimeError(f"rank {rank} failed: {text}")

    def agree(self, value: object, what: str) -> None:
        """Raises ``InputError`` on every rank where they do not all see the same."""
        if len({repr(each) for each in self.gather(value)}) > 1:
            raise InputError(f"{what} differs between ranks; it must be on a disk that all nodes share")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without communication that every rank runs; an error on one is raised on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_together(error)


class DistributedRanks(Ranks):
    """The ranks of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # Where tensors must be to travel.
        self.device = "cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"

    @override
    def gather(self, value: T) -> list[T]:
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @override
    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        dist.broadcast(tensor, src=owner)
        return tensor

    @override
    def any(self, flag: bool) -> bool:
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    @override
    def reduce(self, tensor: Tensor, owner: int) -> None:
        dist.reduce(tensor, dst=owner)

    @override
    def send(self, tensor: Tensor, to: int) -> None:
        dist.send(tensor.to(self.device), dst=to)

    @override
    def receive(self, size: int, owner: int) -> Tensor:
        tensor = torch.empty(size, device=self.device)
        dist.recv(tensor, src=owner)
        return tensor


def current_ranks() -> Ranks:
    """The ranks of this run."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return DistributedRanks() if several else Ranks()


def share_out(costs: Mapping[str, float], groups: Mapping[str, Hashable], size: int) -> dict[str, int]:
    """Gives every layer an owner: the dearest group next goes to the rank with the least to do.

    Args:
        costs: Of each layer.
        groups: Layers of the same group (those that share an input) get one owner.
        size: Number of ranks.

    Example:
        >>> share_out({"gate": 2, "up": 2, "down": 3}, {"gate": "in", "up": "in", "down": "down"}, 2)
        {'gate': 0, 'up': 0, 'down': 1}
    """
    totals: dict[Hashable, float] = {}
    for name, cost in costs.items():
        totals[groups[name]] = totals.get(groups[name], 0) + cost
    loads = [0.0] * size
    owner: dict[Hashable, int] = {}
    for group in sorted(totals, key=totals.__getitem__, reverse=True):
        owner[group] = loads.index(min(loads))
        loads[owner[group]] += totals[group]
    return {name: owner[groups[name]] for name in costs}


def rounds(names: Collection[str], owners: Mapping[str, int]) -> Iterator[list[str]]:
    """The layers that are worked on at the same time, at most one of each rank.

    Example:
        >>> list(rounds("abcd", {"a": 0, "b": 0, "c": 0, "d": 1}))
        [['a', 'd'], ['b'], ['c']]
    """
    of_ranks = [[name for name in names if owners[name] == rank] for rank in sorted({owners[n] for n in names})]
    for some in zip_longest(*of_ranks):
        yield [name for name in some if name is not None]


def _portable(error: BaseException | None) -> tuple[bool, str] | None:
    """An error as something that every rank can read."""
    if error is None:
        return None
    return isinstance(error, InputError), str(error) or type(error).__name__
