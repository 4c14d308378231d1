"""Sums of outer products, X^T X, added up over many batches."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# The upper triangle is worked off in panels of columns; n panels cost (n + 1) / (2 n) of the full
# product and as much memory, but narrow panels are slow ones. (Panels, from this size on.)
PANELS = ((8, 2752), (4, 512), (2, 256), (1, 0))
# A float32 sum of thousands of terms loses digits: after this many batches the running sum moves to
# a second accumulator, so that neither ever adds a small number to a very large one.
BATCHES_TO_FLUSH = 64


class SecondMoment:
    """Running sum of X^T X in float32, of which only the upper triangle is computed and kept.

    Args:
        size: Number of features d.
        device: Where sums are computed, and where the accumulator of the latest batches lives. That of earlier ones,
            which is needed once in 64 batches, is in host memory where the device is a GPU.
    """

    here = True  # the sum is kept in this process

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.size = size
        self.device = torch.device(device)
        self._home = torch.device("cpu") if self.device.type == "cuda" else self.device
        self._panels = panel_edges(size)
        self._recent = self._zeros(self.device)
        self._settled: list[Tensor] | None = None
        self._settled_trace = torch.zeros((), device=self.device, dtype=torch.float32)
        self._batches = 0

    def add(self, x: Tensor) -> None:
        """Adds ``x^T x`` for x [n, d], summed in float32 whatever the dtype of x.

        Raises:
            InputError: x has another width.
        """
        if x.shape[1] != self.size:
            raise InputError(f"vectors of {x.shape[1]} numbers cannot be added to a sum of {self.size} x {self.size}")
        accumulate_upper(self._recent, self._panels, x)
        self.count_batch()

    def add_panel(self, number: int, panel: Tensor) -> None:
        """Adds to one panel what ``accumulate_upper`` gave for it; ``count_batch`` follows the last."""
        self._recent[number] += panel

    def count_batch(self) -> None:
        """Notes the end of a batch."""
        self._batches += 1
        if self._batches % BATCHES_TO_FLUSH == 0:
            self._settle()

    def sum(self) -> Tensor:
        """The symmetric sum so far, float32 [d, d]."""
        full = torch.empty(self.size, self.size, device=self.device, dtype=torch.float32)
        for i, (first, last) in enumerate(self._panels):
            panel = self._recent[i]
            if self._settled is not None:
                panel = panel + self._settled[i].to(self.device)
            full[:first, first:last] = panel[:first]
            full[first:last, :first] = panel[:first].T
            full[first:last, first:last] = mirror(panel[first:])
        return full

    def packed(self) -> Tensor:
        """Upper triangle of the sum as a vector [d (d + 1) / 2]: what travels between ranks."""
        return pack_upper(self.sum())

    def load_packed(self, packed: Tensor) -> None:
        """Replaces the sum."""
        full = unpack_upper(packed, self.size)
        self._settled = [full[:last, first:last].to(self._home, copy=True) for first, last in self._panels]
        self._settled_trace = full.trace().to(self.device)
        for panel in self._recent:
            panel.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything a later ``load_state`` needs to go on as if never interrupted, bit for bit."""
        kept = {"recent": self._recent, "settled": self._settled or []}
        state = {f"{kind}{i}": panel for kind, panels in kept.items() for i, panel in enumerate(panels)}
        return state | {"batches": torch.tensor(self._batches)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what ``state`` gave, on this object's device."""
        for i, panel in enumerate(self._recent):
            panel.copy_(state[f"recent{i}"])
        self._settled = None
        self._settled_trace = torch.zeros((), device=self.device, dtype=torch.float32)
        if "settled0" in state:
            self._settled = [state[f"settled{i}"].to(self._home, copy=True) for i in range(len(self._recent))]
            self._settled_trace = self._trace(self._settled).to(self.device)
        self._batches = int(state["batches"])

    def trace(self) -> Tensor:
        """Trace of the sum, a scalar tensor on the device: not finite once any feature was not."""
        return self._settled_trace + self._trace(self._recent)

    def _trace(self, panels: list[Tensor]) -> Tensor:
        diagonals = [panel.diagonal(-first) for (first, _), panel in zip(self._panels, panels, strict=True)]
        return torch.cat(diagonals).sum()

    def _settle(self) -> None:
        self._settled = self._settled or self._zeros(self._home)
        self._settled_trace = self._settled_trace + self._trace(self._recent)
        for settled, recent in zip(self._settled, self._recent, strict=True):
            settled += _brought(recent, self._home)
            recent.zero_()

    def _zeros(self, device: torch.device) -> list[Tensor]:
        return [torch.zeros(last, last - first, device=device, dtype=torch.float32) for first, last in self._panels]


def _brought(panel: Tensor, home: torch.device) -> Tensor:
    """A panel where its sum is kept."""
    if panel.device.type == home.type:
        return panel
    # 30 times faster than into pageable memory on an H200; the allocator keeps the pinned block for the next panel.
    return torch.empty(panel.shape, dtype=panel.dtype, device=home, pin_memory=True).copy_(panel)


def accumulator_numbers(size: int) -> int:
    """How many float32 numbers both accumulators of a ``SecondMoment`` of this size hold."""
    return 2 * sum(last * (last - first) for first, last in panel_edges(size))


def accumulators_on(kind: str) -> int:
    """Of the two accumulators of a ``SecondMoment``, how many are on its device of a kind (``cpu``, ``cuda``)."""
    return 1 if kind == "cuda" else 2


def panel_edges(size: int) -> list[tuple[int, int]]:
    """First and last column of each panel."""
    count = next(panels for panels, smallest in PANELS if size >= smallest)
    return [(i * size // count, (i + 1) * size // count) for i in range(count)]


def accumulate_upper(panels: list[Tensor], edges: list[tuple[int, int]], x: Tensor) -> None:
    """panel += x[:, :last]^T x[:, first:last] for each panel: exact products, float32 sums.

    Products of two bfloat16 numbers are exact in float32. CUDA multiplies them on its matrix units
    and adds to a float32 panel in the same step; a CPU gets a float32 copy, and leave to use its bfloat16 units on
    it where those sum in float32 too.
    """
    if x.dtype == torch.bfloat16 and x.is_cuda:
        for (first, last), panel in zip(edges, panels, strict=True):
            torch.addmm(panel, x[:, :last].T, x[:, first:last], out_dtype=torch.float32, out=panel)
        return
    with _cpu_products("bf16" if x.dtype == torch.bfloat16 else "ieee"):
        x = x.float()
        for (first, last), panel in zip(edges, panels, strict=True):
            panel.addmm_(x[:, :last].T, x[:, first:last])


@contextmanager
def _cpu_products(precision: str) -> Iterator[None]:
    """Sets how oneDNN multiplies float32 matrices, for the whole process, and puts it back."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # put there when torch is imported
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def mirror(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of ``upper`` [d, d]."""
    return torch.triu(upper) + torch.triu(upper, 1).T


def pack_upper(matrix: Tensor) -> Tensor:
    """Upper triangle of [d, d], row after row, as a vector [d (d + 1) / 2]."""
    return torch.cat([matrix[i, i:] for i in range(len(matrix))])


def unpack_upper(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix [size, size] whose upper triangle is ``packed``."""
    matrix = packed.new_zeros(size, size)
    start = 0
    for i in range(size):
        matrix[i, i:] = packed[start : start + size - i]
        start += size - i
    return mirror(matrix)
