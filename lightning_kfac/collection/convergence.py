"""When a collection has seen enough: what an edit would keep, compared at every doubling of the tokens."""

from collections.abc import Mapping
from typing import TypedDict

import torch

from lightning_kfac.factors.folder import input_leaders
from lightning_kfac.factors.kronecker import KroneckerFactors, most_tokens
from lightning_kfac.math.overlap import KeptSet, overlap
from lightning_kfac.math.spectrum import Spectrum, eigenbasis

FIRST_SNAPSHOT = 2048


class SnapshotsState(TypedDict):
    """How far a comparison has come: tokens seen, at which it is due next, and those of the last one."""

    seen: int
    next: int
    last: int | None


class Snapshots:
    """Kept sets at a rho, the latest against the one before.

    Args:
        rho: Of the edit to come.

    Attributes:
        device: Where eigenbases are computed and compared.
    """

    def __init__(self, rho: float):
        self.rho = rho
        self.device = torch.device("cpu")
        self._seen = 0
        self._next = FIRST_SNAPSHOT
        self._last: dict[str, KeptSet] = {}
        self._last_tokens: int | None = None

    def due(self, tokens: int) -> bool:
        """Counts the tokens of a batch (of all ranks) and says whether a snapshot is due."""
        self._seen += tokens
        if self._seen < self._next:
            return False
        while self._next <= self._seen:
            self._next *= 2
        return True

    def state(self) -> SnapshotsState:
        """What ``load_state`` needs, beside the factors that were compared last: ``last`` is their token count."""
        return {"seen": self._seen, "next": self._next, "last": self._last_tokens}

    def load_state(self, state: SnapshotsState, last: Mapping[str, KroneckerFactors] | None) -> None:
        """Goes on from there.

        Args:
            last: The factors that were compared last, if any were.
        """
        self._seen = state["seen"]
        self._next = state["next"]
        if last is not None:
            self.compare(last)

    def compare(self, factors: Mapping[str, KroneckerFactors]) -> dict[str, float]:
        """Overlap in [0, 1] of each layer's kept set with that of the last call; empty the first time."""
        inputs: dict[str, Spectrum] = {}
        kept: dict[str, KeptSet] = {}
        for name, leader in input_leaders(factors).items():
            layer = factors[name]
            if not layer.n_tokens:  # an expert that nothing came to yet
                continue
            if leader not in inputs:
                inputs[leader] = eigenbasis(layer.A.to(self.device), f"A of {leader}")
            kept[name] = KeptSet.at(self.rho, eigenbasis(layer.G.to(self.device), f"G of {name}"), inputs[leader])
        overlaps = {name: overlap(self._last[name], kept[name]) for name in kept if name in self._last}
        self._last = kept
        self._last_tokens = most_tokens(factors)
        return overlaps
