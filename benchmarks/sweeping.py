"""Linear algebra of a sweep of 20 edits beside that of a single edit.

    python -m benchmarks.sweeping [--d_out 2048] [--d_in 768] [--output benchmarks/results/sweeping.json]

One thread, medians of 5, interleaved. Both begin without bases: the single edit and the sweep each compute them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from lightning_kfac import EditConfig, KFACEditor, KroneckerFactors
from lightning_kfac.editing import sweep

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


def seconds(model: nn.Module, factors: dict, configs: list[EditConfig]) -> float:
    """Time of all edits with a fresh editor."""
    begin = time.perf_counter()
    editor = KFACEditor(model, factors, repeated=True)
    for _ in sweep.run(editor, configs, lambda model: {}):
        pass
    return time.perf_counter() - begin


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
    times = [(seconds(model, factors, grid[:1]), seconds(model, factors, grid)) for _ in range(REPEATS)]
    single, many = (statistics.median(column) for column in zip(*times, strict=True))
    result = {"shape": [options.d_out, options.d_in], "edits": len(grid), "single_s": single, "sweep_s": many}
    shape = f"{options.d_out} x {options.d_in}"
    print(f"{shape}: one edit {single:.2f} s, {len(grid)} edits {many:.2f} s: {many / single:.2f} times")
    if options.output:
        options.output.write_text(json.dumps(result | {"ratio": many / single}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
