"""Ranks that run a sharded model unequally often, without waiting for each other for ever."""

from types import TracebackType
from typing import TYPE_CHECKING

import torch

from lightning_kfac.distributed.ranks import Ranks, current_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lockstep:
    """A block in which every rank may run a sharded model as often as it likes.

    A forward of a sharded model needs all ranks. Inside the block each forward first asks whether anybody works; a
    rank that has finished its block goes on with forwards on one token until nobody does.

    Args:
        model: Sharded over the ranks (``is_sharded``).

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> model = load_model("demo")
        >>> with Lockstep(model):
        ...     logits = model(torch.ones(1, 1, dtype=torch.long)).logits
    """

    def __init__(self, model: "PreTrainedModel", ranks: Ranks | None = None):
        self.model = model
        self.ranks = ranks or current_ranks()
        self._active = False
        self._inside = False
        # Before the hook that gathers the weights: all ranks ask first.
        model.base_model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.base_model.register_forward_hook(self._after_forward)

    def __enter__(self) -> "Lockstep":
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        if error is not None and self._inside:
            return  # the others wait within a forward that this rank cannot finish: RankWatch ends them
        device = next(self.model.parameters()).device
        while self.ranks.any(False):
            with torch.no_grad():
                self.model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        # Whoever fails would be missing in the next block.
        self.ranks.raise_together(error)

    def _before_forward(self, *_: object) -> None:
        if self._active:
            self.ranks.any(True)
            self._inside = True

    def _after_forward(self, *_: object) -> None:
        self._inside = False
