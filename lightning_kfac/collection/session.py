"""A collection, with or without a Trainer: its plan, and capture and engine of the pass that is running."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.memory import MemoryPlan, plan_memory
from lightning_kfac.collection.objective import Batch, Objective
from lightning_kfac.collection.sharded_sums import sharded_sums
from lightning_kfac.collection.sums import FactorSums, LayerSums
from lightning_kfac.distributed.ranks import Ranks, current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.models.layers import Layer


class CollectionSession:
    """Curvature of some layers, in one pass over the text or in several.

    Usage: ``make_plan``; then for each pass ``open``, for each batch ``run`` and a backward of its loss, and ``close``.

    Args:
        model: Without trainable parameters, in eval mode.
        layers: The tracked layers by name.
        objective: What is differentiated.
        max_memory_gb, layers_per_pass, processes, owning_ranks: As for ``plan_memory``.

    Attributes:
        plan: How the collection is cut.
        capture: Of the pass that is running.
        loss: Summed loss of the latest batch, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        objective: Objective,
        *,
        max_memory_gb: float | None = None,
        layers_per_pass: int | None = None,
        processes: int = 1,
        owning_ranks: int | None = None,
    ):
        self.model = model
        self.layers = dict(layers)
        self.objective = objective
        self.plan: MemoryPlan | None = None
        self.capture: CurvatureCapture | None = None
        self.loss = torch.zeros(())
        self._limits = {
            "max_memory_gb": max_memory_gb,
            "layers_per_pass": layers_per_pass,
            "processes": processes,
            "owning_ranks": owning_ranks,
        }
        self._engine: CurvatureEngine | None = None

    def make_plan(self, shape: tuple[int, int], agree: Callable[[MemoryPlan], MemoryPlan] = lambda plan: plan) -> None:
        """Chooses passes and how batches are cut, before the first batch.

        Args:
            shape: Rows and positions of a full batch.
            agree: Gives every rank the same plan: they may see different free memory.

        Raises:
            InputError: Nothing fits, or a layer cannot be tracked.
        """
        self.plan = agree(plan_memory(self.model, self.layers, self.objective, *shape, **self._limits))

    def cut_anew(self, shape: tuple[int, int], agree: Callable[[MemoryPlan], MemoryPlan] = lambda plan: plan) -> None:
        """Cuts batches for the memory that there is now; the passes of the plan stay."""
        before = self.plan
        self.make_plan(shape, agree)
        self.plan = replace(before, rows_at_once=self.plan.rows_at_once, head_chunk=self.plan.head_chunk)

    def open(self, names: Iterable[str], sums: Callable[[Layer], LayerSums] | None = None) -> CurvatureCapture:
        """Begins a pass over some of the layers.

        Args:
            names: A pass of the plan.
            sums: What is summed at a layer; by default A and G.
        """
        layers = {name: self.layers[name] for name in names}
        ranks = Ranks()
        if self.plan.owners is not None:
            ranks = current_ranks()
            sums = sharded_sums(ranks, self.plan.owners)
        self.capture = CurvatureCapture(layers, sums or FactorSums, self.plan.leaders, ranks=ranks)
        self.capture.__enter__()
        self._engine = CurvatureEngine(
            self.model, self.capture, self.objective, self.plan.rows_at_once, self.plan.head_chunk
        )
        return self.capture

    def run(self, batch: Batch) -> Tensor:
        """Runs a batch up to its very last backward.

        Returns:
            The loss that the caller must differentiate.
        """
        if self._engine is None:
            raise InputError("the collection has not begun: CurvatureCollector must be among trainer.callbacks")
        last, self.loss = self._engine.run(batch)
        return last

    def check_finite(self, where: str) -> None:
        """Raises ``InputError`` naming the first layer whose sums are no longer finite; waits for the device."""
        self.capture.check_finite(self.loss, where)

    def close(self, add_over_ranks: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """Ends a pass; what its sums give, by layer (see ``CurvatureCapture.results``).

        Args:
            add_over_ranks: Sum all-reduce of a tensor, where several ranks collect.
        """
        if add_over_ranks is not None:
            self.capture.reduce(add_over_ranks)
        found = self.capture.results(self.objective.mc_samples)
        self.abandon()
        return found

    def abandon(self) -> None:
        """Ends a pass without its results; does nothing where none is running."""
        if self.capture is not None:
            self.capture.__exit__()
            self.capture = None
            self._engine = None
