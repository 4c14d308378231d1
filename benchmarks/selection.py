"""How long selection takes at the shape of a 7B projection, beside a heap walk and a full sort.

    python -m benchmarks.selection [--output benchmarks/results/selection.json]

One thread, wall and CPU time. select_products: median of 7. The heap walk takes the products one by one from a heap of
row heads, as the original tool does; it, select_components and the full sort run once, at full size.
"""

import argparse
import heapq
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import Watch, clocked, medians, pairs
from lightning_kfac.math.importance import original
from lightning_kfac.math.selection import select_components, select_products

D_OUT, D_IN = 11008, 4096
# lambda_k and mu_k fall as k^-p. The demo's layers keep 4 to 8 % at rho 0.6 and 29 to 40 % at 0.9: p about 0.6.
EXPONENTS = (0.5, 0.6, 0.75, 1.0)
RHOS = (0.6, 0.9)
REPEATS = 7


def spectrum(size: int, exponent: float, seed: int) -> Tensor:
    """A power law with 10 % of noise, descending, float64."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent * (0.1 * noise).exp()
    return values.sort(descending=True).values


def heap_walk(rows: Tensor, columns: Tensor, rho: float) -> int:
    """Number of components taken, largest first, until they hold a share rho."""
    lambdas, mus = rows.tolist(), columns.tolist()
    target = rho * sum(lambdas) * sum(mus)
    heap = [(-value * mus[0], i, 0) for i, value in enumerate(lambdas)]
    heapq.heapify(heap)
    taken, total = 0, 0.0
    while total < target:
        value, i, j = heapq.heappop(heap)
        total -= value
        taken += 1
        if j + 1 < len(mus):
            heapq.heappush(heap, (-lambdas[i] * mus[j + 1], i, j + 1))
    return taken


def compare(exponent: float, rho: float) -> dict:
    """One row of the table."""
    rows, columns = spectrum(D_OUT, exponent, 0), spectrum(D_IN, exponent, 1)
    fast = medians(pairs({"fast": lambda: select_products(rows, columns, rho)}, REPEATS))["fast"]
    kept = int(select_products(rows, columns, rho).sum())
    walk = clocked(lambda: heap_walk(rows, columns, rho))._asdict()
    importance = original(rows, columns)
    if int(select_components(importance, rho).sum()) != kept:
        raise SystemExit("the two selections differ")
    return {
        "exponent": exponent,
        "rho": rho,
        "kept": kept / (D_OUT * D_IN),
        "select_products_s": fast,
        "select_components_s": clocked(lambda: select_components(importance, rho))._asdict(),
        "full_sort_s": clocked(lambda: importance.flatten().sort(descending=True, stable=True))._asdict(),
        "heap_walk_s": walk,
        "times_faster_than_heap": {clock: walk[clock] / fast[clock] for clock in fast},
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    table = [compare(exponent, rho) for exponent in EXPONENTS for rho in RHOS]
    for row in table:
        print(
            f"p {row['exponent']:<4} rho {row['rho']}: keeps {row['kept']:6.2%}, select_products "
            f"{1000 * row['select_products_s']['cpu']:5.1f} ms, heap walk {row['heap_walk_s']['cpu']:6.1f} s "
            f"({row['times_faster_than_heap']['cpu']:,.0f} times), select_components "
            f"{row['select_components_s']['cpu']:.1f} s, full sort {row['full_sort_s']['cpu']:.1f} s of CPU time"
        )
    if options.output:
        result = {"machine": watch.about(), "shape": [D_OUT, D_IN], "rows": table}
        options.output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    least = min(row["times_faster_than_heap"]["cpu"] for row in table)
    watch.conclude(f"select_products is at least {least:,.0f} times as fast as the heap walk")


if __name__ == "__main__":
    main()
