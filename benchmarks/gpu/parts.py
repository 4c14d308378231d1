"""What the parts share: the machine, timing, and a file that is written again after every step."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import machine as describe


@dataclass
class Part:
    """One part of the benchmark: its budget, and what it has found so far, in a file of its own.

    Attributes:
        name: Of the file.
        output: Folder.
        device: ``cuda`` or ``cpu``.
        small: Sizes for a test on a CPU.
        budget: Seconds; a step that would begin later is left out.
    """

    name: str
    output: Path
    device: str
    small: bool
    budget: float
    found: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Takes what was found on the same machine before; what failed or was left out is done again."""
        path = self.output / f"{self.name}.json"
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if before.get("machine", {}).get("gpu") == machine()["gpu"] and before.get("small") == self.small:
            kept = {name for name, found in before.items() if not _undone(found)}
            self.found = {name: before[name] for name in before if name in kept and not name.endswith(".trace")}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Does one step and writes what it found, or that it failed; None where it failed or time is up."""
        if name in self.found and not _undone(self.found[name]):
            return self.found[name]
        elapsed = time.monotonic() - self.begin
        if elapsed > self.budget:
            self.found[name] = {"left_out": f"after {elapsed:.0f} s of {self.budget:.0f}"}
            self.write()
            return None
        begin = time.monotonic()
        result = None
        try:
            result = work()
            self.found[name] = result
        except Exception as error:
            self.found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            self.found[f"{name}.trace"] = traceback.format_exc()[-1500:]
        self.free()
        print(f"{self.name}/{name}: {time.monotonic() - begin:.1f} s {_short(self.found[name])}", flush=True)
        self.write()
        return result

    def write(self) -> None:
        """Writes the file."""
        self.output.mkdir(parents=True, exist_ok=True)
        about = {"machine": machine(), "small": self.small, "seconds": time.monotonic() - self.begin}
        text = json.dumps({**self.found, **about}, indent=1, default=float)
        (self.output / f"{self.name}.json").write_text(text + "\n", "utf-8")

    def free(self) -> None:
        """Gives back what nothing holds any more."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one call."""
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def median(self, run: Callable[[], Any], repeats: int = 5) -> float:
        """Seconds of one call, the median of some after one that warms up."""
        run()
        return statistics.median(self.seconds(run) for _ in range(repeats))

    def peak(self, run: Callable[[], Any]) -> float:
        """Bytes on the device at most, beyond those before; 0 on a CPU."""
        if self.device != "cuda":
            run()
            return 0.0
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def _undone(found: Any) -> bool:
    return isinstance(found, dict) and bool({"failed", "left_out"} & found.keys())


def machine() -> dict[str, Any]:
    """What it ran on."""
    return describe() | {"transformers": transformers.__version__, "cuda": torch.version.cuda}


def random_model(family: str, shape: dict[str, int], device: str, dtype: torch.dtype) -> nn.Module:
    """A causal language model with random weights, made where it will run."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, pad_token_id=0, eos_token_id=0, max_position_embeddings=1024, **shape)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def random_rows(vocabulary: int, rows: int, seq_len: int, device: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, vocabulary, (rows, seq_len), generator=generator).to(device)}


def product_rate(part: Part, dtype: torch.dtype, size: int) -> float:
    """Of square matrices, the median of ten, FLOP/s."""
    a, b = (torch.randn(size, size, device=part.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / part.median(lambda: a @ b, repeats=10)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative, in the Frobenius norm; both on the CPU in float64."""
    found, reference = found.detach().cpu().double(), reference.detach().cpu().double()
    return float((found - reference).norm() / reference.norm())


def _short(found: Any) -> str:
    text = json.dumps(found, default=float)
    return text if len(text) < 700 else f"{text[:700]} ..."
