"""How long selection takes at the shape of a 7B projection, beside a heap walk and a full sort.

    python -m benchmarks.selection [--output benchmarks/results/selection.json]

One thread, medians of 7, interleaved. The heap walk takes the products one by one from a heap of row heads, as
the original tool does; it is measured at an eighth of both sides and extrapolated by the number of components it
takes (its cost a component grows with the logarithm of the rows, so this flatters it).
"""

import argparse
import heapq
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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


def seconds(run: Callable[[], object]) -> float:
    """Wall clock of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def compare(exponent: float, rho: float) -> dict:
    """One row of the table."""
    rows, columns = spectrum(D_OUT, exponent, 0), spectrum(D_IN, exponent, 1)
    few_rows, few_columns = spectrum(D_OUT // 8, exponent, 0), spectrum(D_IN // 8, exponent, 1)
    fast, walks = [], []
    for _ in range(REPEATS):
        fast.append(seconds(lambda: select_products(rows, columns, rho)))
        walks.append(seconds(lambda: heap_walk(few_rows, few_columns, rho)))
    kept = int(select_products(rows, columns, rho).sum())
    each = statistics.median(walks) / heap_walk(few_rows, few_columns, rho)
    importance = original(rows, columns)
    begin = time.perf_counter()
    chosen = select_components(importance, rho)
    components = time.perf_counter() - begin
    if int(chosen.sum()) != kept:
        raise SystemExit("the two selections differ")
    begin = time.perf_counter()
    importance.flatten().sort(descending=True, stable=True)
    return {
        "exponent": exponent,
        "rho": rho,
        "kept": kept / (D_OUT * D_IN),
        "select_products_ms": 1000 * statistics.median(fast),
        "select_components_s": components,
        "full_sort_s": time.perf_counter() - begin,
        "heap_walk_s_extrapolated": each * kept,
        "times_faster_than_heap": each * kept / statistics.median(fast),
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = [compare(exponent, rho) for exponent in EXPONENTS for rho in RHOS]
    for row in table:
        print(
            f"p {row['exponent']:<4} rho {row['rho']}: keeps {row['kept']:6.2%}, select_products "
            f"{row['select_products_ms']:5.1f} ms, heap walk {row['heap_walk_s_extrapolated']:6.1f} s "
            f"({row['times_faster_than_heap']:,.0f} times), select_components {row['select_components_s']:.1f} s, "
            f"full sort {row['full_sort_s']:.1f} s"
        )
    if options.output:
        options.output.write_text(json.dumps({"shape": [D_OUT, D_IN], "rows": table}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
