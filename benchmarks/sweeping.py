"""Linear algebra of a sweep of 20 edits beside that of a single edit.

    python -m benchmarks.sweeping [--d_out 2048] [--d_in 768] [--output benchmarks/results/sweeping_2048.json]

One thread, in turn, medians over pairs of runs. Both begin without bases: the single edit and the sweep each compute
them. Linear algebra: eigenbases, rotation into them and back. The rest is selection, norms for the report, copies.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import Seconds, Watch, medians, pairs, ratios
from lightning_kfac import EditConfig, KFACEditor, KroneckerFactors
from lightning_kfac.editing import curvature, select, sweep
from lightning_kfac.factors import bases

RHOS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
FORMULAS = ["original", "modified"]


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
        self.total = Seconds(0.0, 0.0)
        for module, name in ((bases, "eigenbasis"), (curvature, "components"), (select, "suppress")):
            setattr(module, name, self._timed(getattr(module, name)))

    def _timed(self, function: Callable) -> Callable:
        def timed(*args):
            begin = Seconds.now()
            result = function(*args)
            taken = Seconds.now().since(begin)
            self.total = Seconds(self.total.wall + taken.wall, self.total.cpu + taken.cpu)
            return result

        return timed


def edit_all(model: nn.Module, factors: dict, configs: list[EditConfig]) -> None:
    """All edits with a fresh editor."""
    editor = KFACEditor(model, factors, repeated=True)
    for _ in sweep.run(editor, configs, lambda model: {}):
        pass


def measure(d_out: int, d_in: int, repeats: int) -> dict:
    """Everything timed first, then what of it is linear algebra, with a stopwatch inside."""
    model, factors = layer_and_factors(d_out, d_in)
    grid = sweep.grid(EditConfig(), formulas=FORMULAS, rhos=RHOS)
    whole = {
        "one edit": lambda: edit_all(model, factors, grid[:1]),
        "sweep": lambda: edit_all(model, factors, grid),
    }
    found = {"whole": pairs(whole, repeats)}
    stopwatch = Stopwatch()

    def algebra(run: Callable[[], None]) -> Seconds:
        stopwatch.total = Seconds(0.0, 0.0)
        run()
        return stopwatch.total

    found["linear_algebra"] = pairs({name: partial(algebra, run) for name, run in whole.items()}, repeats)
    parts = {
        part: {"seconds": medians(times), "ratio": ratios(times, "sweep", "one edit")} for part, times in found.items()
    }
    return {"shape": [d_out, d_in], "edits": len(grid), **parts}


def main() -> None:
    """Prints the ratio and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d_out", type=int, default=2048)
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    result = measure(options.d_out, options.d_in, options.repeats)
    result = {"machine": watch.about(), **result}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    watch.conclude(f"{result['edits']} edits take {result['whole']['ratio']['cpu']:.2f} times one edit's CPU time")


if __name__ == "__main__":
    main()
