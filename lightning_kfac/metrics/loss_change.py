"""LossChange: by how much does an edit change the loss of each token?"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.metrics.described import Described, Setting, TextSeen

# In nats; what lies beyond counts in the first or last bin.
EDGES = torch.linspace(-4, 4, 81, dtype=torch.float64)


class LossChange(Described):
    """Histogram of (loss after - loss before) over tokens, in 80 bins of 0.1 nats from -4 to 4.

    Example:
        >>> metric = LossChange()
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.05, 9.0]]), torch.tensor([[True, True]]))
        >>> metric.compute().nonzero().flatten().tolist()
        [40, 79]

    Attributes:
        counts: The state: int64 [80].
    """

    counts: Tensor
    seen = TextSeen
    full_state_update = False

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return cls() if setting.compared else None

    @override
    def observe(self, seen: TextSeen) -> None:
        if seen.before is None:
            raise RuntimeError("LossChange needs the losses of the unedited model: see Setting.compared")
        self.update(seen.before, seen.losses.float(), seen.valid)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(len(EDGES) - 1, dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, before: Tensor, after: Tensor, valid: Tensor) -> None:
        """Adds token losses [B, T] of the same tokens; valid bool [B, T]."""
        change = (after - before)[valid].double()
        place = torch.bucketize(change, EDGES[1:-1].to(change.device), right=True)
        self.counts += torch.bincount(place, minlength=len(self.counts))

    @override
    def compute(self) -> Tensor:
        """int64 [80]."""
        return self.counts
