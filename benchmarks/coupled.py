"""What coupled factors cost beside plain ones, and beside the second pass that measures EK-FAC's moments.

    OMP_NUM_THREADS=1 python -m benchmarks.coupled               # CPU, about 4 minutes

The d 512 model of benchmarks.collection, blocks 5 to 7, the same tokens. The three run in turn; medians over five
rounds of process CPU time, and of wall time. Bases that moments need are computed once before, and counted apart.
Writes benchmarks/results/coupled.json.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.collection import PROJECTIONS, build, tokens
from benchmarks.machine import Watch, clocked, medians, pairs, ratios
from lightning_kfac import collect_factors, collect_moments
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.models.targets import resolve_targets

BLOCKS = [5, 6, 7]
REPEATS = 5


def measure(rows: int, seq_len: int, batches: int, repeats: int = REPEATS) -> dict:
    """Times and bytes of each way."""
    model = build(torch.float32)
    text = tokens(model.config.vocab_size, rows, seq_len, batches)
    chosen = {"blocks": BLOCKS, "projections": PROJECTIONS, "labels": "gold"}
    factors = collect_factors(model, text, **chosen)
    bases = BasisCache.beside(factors)
    eigen = clocked(lambda: [bases.of(factors, name) for name in factors]).cpu
    ways = {
        "A and G": lambda: collect_factors(model, text, **chosen),
        "with coupled factors": lambda: collect_factors(model, text, coupled=True, **chosen),
        "moments, second pass": lambda: collect_moments(model, text, factors, labels="gold"),
    }
    times = pairs(ways, repeats)
    seconds = medians(times)
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
                "cpu_s": seconds[name]["cpu"],
                "wall_s": seconds[name]["wall"],
                "beside_plain": ratios(times, name, "A and G"),
                "accumulators_bytes": held[name],
            }
            for name in ways
        },
        "times": times,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    found = measure(arguments.rows, arguments.seq_len, arguments.batches)
    for name, way in found["ways"].items():
        print(
            f"{name}: {way['cpu_s']:.1f} s of CPU ({way['beside_plain']['cpu']:.2f}), {way['wall_s']:.1f} s, "
            f"accumulators {way['accumulators_bytes'] / 1e6:.0f} MB"
        )
    print(f"eigenbases, which the second pass waits for (as edits do): {found['eigenbases_cpu_s']:.1f} s of CPU")
    path = Path(__file__).parent / "results" / "coupled.json"
    path.write_text(json.dumps({"machine": watch.about(), **found}, indent=1) + "\n", "utf-8")
    more = found["ways"]["with coupled factors"]["beside_plain"]["cpu"]
    second = found["ways"]["moments, second pass"]["beside_plain"]["cpu"]
    watch.conclude(f"coupled factors cost {more - 1:.0%} more than A and G alone, the second pass {second:.0%} more")


if __name__ == "__main__":
    main()
