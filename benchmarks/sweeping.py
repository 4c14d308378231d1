"""Linear algebra of a sweep of 20 edits beside that of a single edit.

    python -m benchmarks.sweeping [--d_out 2048] [--d_in 768] [--output benchmarks/results/sweeping.json]

One thread, medians of 5, interleaved. Both begin without bases: the single edit and the sweep each compute them.
Linear algebra: eigenbases, rotation into them and back. The rest is selection, norms for the report, copies.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_kfac import EditConfig, KFACEditor, KroneckerFactors
from lightning_kfac.editing import select as layer
from lightning_kfac.editing import sweep
from lightning_kfac.factors import bases

RHOS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
FORMULAS = ["original", "modified"]
REPEATS = 5


def layer_and_factors(d_out: int, d_in: int) -> tuple[nn.Module, dict[str, KroneckerFactors]]:
    """One random layer with factors whose spectra fall as a power law."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc = nn.Linear(d_in, d_out, bias=False)
    made = []
    for size in (d_in, d_out):
        x = torch.randn(2 * size, size) * torch.arange(1, size + 1) ** -0.3
        made.append(x.T @ x / len(x))
    return model, {"fc": KroneckerFactors(*made, n_tokens=1)}


class Stopwatch:
    """Adds up the time spent in the functions of linear algebra."""

    def __init__(self):
        self.total = 0.0
        for module, name in ((bases, "eigenbasis"), (layer, "components"), (layer, "suppress")):
            setattr(module, name, self._timed(getattr(module, name)))

    def _timed(self, function: Callable) -> Callable:
        def timed(*args):
            begin = time.perf_counter()
            result = function(*args)
            self.total += time.perf_counter() - begin
            return result

        return timed


def seconds(stopwatch: Stopwatch, model: nn.Module, factors: dict, configs: list[EditConfig]) -> tuple[float, float]:
    """Time of all edits with a fresh editor: whole, and in linear algebra."""
    stopwatch.total, begin = 0.0, time.perf_counter()
    editor = KFACEditor(model, factors, repeated=True)
    for _ in sweep.run(editor, configs, lambda model: {}):
        pass
    return time.perf_counter() - begin, stopwatch.total


def main() -> None:
    """Prints the ratio and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d_out", type=int, default=2048)
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, factors = layer_and_factors(options.d_out, options.d_in)
    grid = sweep.grid(EditConfig(), formulas=FORMULAS, rhos=RHOS)
    stopwatch = Stopwatch()
    seconds(stopwatch, model, factors, grid)  # warm-up
    times = [
        (*seconds(stopwatch, model, factors, grid[:1]), *seconds(stopwatch, model, factors, grid))
        for _ in range(REPEATS)
    ]
    single, single_algebra, many, many_algebra = (statistics.median(column) for column in zip(*times, strict=True))
    result = {
        "shape": [options.d_out, options.d_in],
        "edits": len(grid),
        "linear_algebra": {"single_s": single_algebra, "sweep_s": many_algebra, "ratio": many_algebra / single_algebra},
        "whole": {"single_s": single, "sweep_s": many, "ratio": many / single},
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
