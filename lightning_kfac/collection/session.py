"""A collection, with or without a Trainer: its plan, and capture and engine of the pass that is running."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.leftovers import without_leftover_gradients
from lightning_kfac.collection.memory import MemoryPlan, plan_memory
from lightning_kfac.collection.objective import BatchT, Objective
from lightning_kfac.collection.sharded_sums import sharded_sums
from lightning_kfac.collection.sums import FactorSums, LayerSums
from lightning_kfac.distributed.ranks import Ranks, current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.models.compiled import compiled_between
from lightning_kfac.models.layer import Layer


class CollectionSession(Generic[BatchT]):
    """Curvature of some layers, in one pass over the text or in several.

    Usage: ``make_plan``; then for each pass ``open``, for each batch ``run`` and a backward of its loss, and ``close``.

    Args:
        model: Without trainable parameters, in eval mode.
        layers: The tracked layers by name.
        objective: What is differentiated.
        max_memory_gb, layers_per_pass, processes, owning_ranks: As for ``plan_memory``.
        coupled: Also collect the coupled factors, in the same pass.
        compiled: Compile what lies between the tracked layers, see ``compiled_between``.

    Attributes:
        loss: Summed loss of the latest batch, detached.
        n_tokens: Positions that counted in the latest pass, of all ranks, once it has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        objective: Objective[BatchT],
        *,
        max_memory_gb: float | None = None,
        layers_per_pass: int | None = None,
        processes: int = 1,
        owning_ranks: int | None = None,
        coupled: bool = False,
        compiled: bool = False,
    ):
        self.model = model
        self.layers = dict(layers)
        self.objective = objective
        self.max_memory_gb = max_memory_gb
        self.layers_per_pass = layers_per_pass
        self.processes = processes
        self.owning_ranks = owning_ranks
        self.coupled = coupled
        self.compiled = compiled
        self.loss = torch.zeros(())
        self.n_tokens = 0
        self._plan: MemoryPlan | None = None
        self._capture: CurvatureCapture | None = None
        self._engine: CurvatureEngine[BatchT] | None = None
        self._listening = ExitStack()

    @property
    def planned(self) -> bool:
        """Whether there is a plan."""
        return self._plan is not None

    @property
    def plan(self) -> MemoryPlan:
        """How the collection is cut; raises ``RuntimeError`` before ``make_plan``. An earlier run's may be set."""
        if self._plan is None:
            raise RuntimeError("the collection has no plan yet: call make_plan with the shape of a batch")
        return self._plan

    @plan.setter
    def plan(self, plan: MemoryPlan) -> None:
        self._plan = plan

    @property
    def running(self) -> bool:
        """Whether a pass has begun and not ended."""
        return self._capture is not None

    @property
    def capture(self) -> CurvatureCapture:
        """Of the pass that is running; raises ``RuntimeError`` where none is."""
        if self._capture is None:
            raise RuntimeError("no pass of the collection is running: call open")
        return self._capture

    def make_plan(self, shape: tuple[int, int], agree: Callable[[MemoryPlan], MemoryPlan] = lambda plan: plan) -> None:
        """Chooses passes and how batches are cut, before the first batch.

        Args:
            shape: Rows and positions of a full batch.
            agree: Gives every rank the same plan: they may see different free memory.

        Raises:
            InputError: Nothing fits, or a layer cannot be tracked.
        """
        rows, seq_len = shape
        plan = plan_memory(
            self.model,
            self.layers,
            self.objective,
            rows,
            seq_len,
            max_memory_gb=self.max_memory_gb,
            layers_per_pass=self.layers_per_pass,
            processes=self.processes,
            owning_ranks=self.owning_ranks,
            coupled=self.coupled,
        )
        self.plan = agree(plan)

    def cut_anew(self, shape: tuple[int, int], agree: Callable[[MemoryPlan], MemoryPlan] = lambda plan: plan) -> None:
        """Cuts batches for the memory that there is now; the passes of the plan stay."""
        before = self.plan
        self.make_plan(shape, agree)
        self.plan = replace(before, rows_at_once=self.plan.rows_at_once, head_chunk=self.plan.head_chunk)

    def open(self, names: Iterable[str], sums: Callable[[Layer], LayerSums[Any]] | None = None) -> CurvatureCapture:
        """Begins a pass over some of the layers.

        Args:
            names: A pass of the plan.
            sums: What is summed at a layer; by default A and G.
        """
        layers = {name: self.layers[name] for name in names}
        plan = self.plan
        ranks = Ranks()
        if plan.owners is not None:
            ranks = current_ranks()
            sums = sharded_sums(ranks, plan.owners, self.coupled)
        sums = sums or partial(FactorSums, coupled=self.coupled)
        self._capture = CurvatureCapture(layers, sums, plan.uses, ranks=ranks)
        self._listening = ExitStack()
        self._listening.enter_context(without_leftover_gradients(self.model))
        self._listening.enter_context(self._capture)
        if self.compiled:  # only now, as the plan tries the model on other shapes
            self._listening.enter_context(compiled_between(self.model, layers))
        self._engine = CurvatureEngine(self.model, self._capture, self.objective, plan.rows_at_once, plan.head_chunk)
        return self._capture

    def run(self, batch: BatchT) -> Tensor:
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
        self.n_tokens = int(self.capture.positions)
        found = self.capture.results(self.objective.mc_samples)
        self.abandon()
        return found

    def abandon(self) -> None:
        """Ends a pass without its results; does nothing where none is running."""
        if self._capture is not None:
            self._listening.close()
            self._capture = None
            self._engine = None
