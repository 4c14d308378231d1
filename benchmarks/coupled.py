"""What coupled factors cost beside plain ones, and beside the second pass that measures EK-FAC's moments.

    OMP_NUM_THREADS=1 python -m benchmarks.coupled               # CPU, about 4 minutes

The d 512 model of benchmarks.collection, blocks 5 to 7, the same tokens. The three run in turn; medians of five of
process CPU time, and of wall time. Bases that moments need are computed once before, and counted apart. Writes
benchmarks/results/coupled.json.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.collection import PROJECTIONS, build, tokens
from benchmarks.limits import median
from lightning_kfac import collect_factors, collect_moments
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.models.targets import resolve_targets

BLOCKS = [5, 6, 7]
REPEATS = 5


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """(process CPU time, wall time)."""
    cpu = time.process_time()
    wall = time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(rows: int, seq_len: int, batches: int, blocks: list[int] | None = None) -> dict:
    """Times and bytes of each way."""
    model = build("cpu", torch.float32)
    text = tokens("cpu", model.config.vocab_size, rows, seq_len, batches)
    chosen = {"blocks": blocks or BLOCKS, "projections": PROJECTIONS, "labels": "gold"}
    factors = collect_factors(model, text, **chosen)
    bases = BasisCache.beside(factors)
    eigen = seconds(lambda: [bases.of(factors, name) for name in factors])[0]
    ways = {
        "A and G": lambda: collect_factors(model, text, **chosen),
        "with coupled factors": lambda: collect_factors(model, text, coupled=True, **chosen),
        "moments, second pass": lambda: collect_moments(model, text, factors, labels="gold"),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            times[name].append(seconds(way))
    layers = resolve_targets(model, chosen["blocks"], PROJECTIONS)
    plan = {flag: plan_memory(model, layers, FisherLoss("gold"), rows, seq_len, coupled=flag) for flag in (False, True)}
    moments = sum(4 * d_out * d_in for d_out, d_in in (layer.shape for layer in layers.values()))
    held = {
        "A and G": plan[False].factor_bytes,
        "with coupled factors": plan[True].factor_bytes,
        "moments, second pass": moments,
    }
    return {
        "tokens": rows * (seq_len - 1) * batches,
        "eigenbases_cpu_s": eigen,
        "ways": {
            name: {
                "cpu_s": median([cpu for cpu, _ in found]),
                "wall_s": median([wall for _, wall in found]),
                "accumulators_bytes": held[name],
            }
            for name, found in times.items()
        },
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.rows, arguments.seq_len, arguments.batches)
    plain = found["ways"]["A and G"]["cpu_s"]
    for name, way in found["ways"].items():
        print(
            f"{name}: {way['cpu_s']:.1f} s of CPU ({way['cpu_s'] / plain:.2f}), {way['wall_s']:.1f} s, "
            f"accumulators {way['accumulators_bytes'] / 1e6:.0f} MB"
        )
    print(f"eigenbases, which the second pass waits for (as edits do): {found['eigenbases_cpu_s']:.1f} s of CPU")
    result = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), **found}
    path = Path(__file__).parent / "results" / "coupled.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
