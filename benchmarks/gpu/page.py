"""The tables of docs/gpu.md, from the files that the parts have written.

python -m benchmarks.gpu.page
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
JOBS = ("three blocks", "all blocks")


def tables() -> str:
    """All tables as Markdown."""
    return "\n".join(_tables())


def _tables() -> Iterator[str]:
    collection = _read("collection")
    yield "| tracked | way | tokens/s | of the limit | peak memory beside the weights | planned |"
    yield "|---|---|---|---|---|---|"
    for name, steps in (("three blocks", ["ours"]), ("all blocks", ["ours", "on 80 GB"])):
        for step in steps:
            found = collection[f"{name}: {step}"]
            label = "" if step == "ours" else f" {step}"
            for labels in ("gold", "sampled"):
                own = found[labels]
                yield (
                    f"| {name} | ours{label}, {labels} labels | {own['tokens_per_second']:,.0f} "
                    f"| {own['of_the_limit']:.0%} | {found['peak_gb']:.1f} GB | {found['planned_gb']:.1f} GB |"
                )
        own = collection[f"{name}: compiled"]
        rate = f"{own['tokens_per_second']:,.0f} | {own['of_the_limit']:.0%}"
        yield f"| {name} | ours, sampled labels, `compile` (first batch {own['first_s']:.0f} s) | {rate} | | |"
    three = collection["three blocks: conventional"]
    one_pass = collection["all blocks: conventional, one pass"]
    for label, one in (
        ("three blocks | conventional, two passes", three),
        ("two of 32 blocks | conventional, one of sixteen passes", one_pass),
    ):
        yield f"| {label} | {one['tokens_per_second']:,.0f} | | {one['peak_gb']:.1f} GB | |"
    yield ""
    experts = _read("experts")
    kinds = ["matrix products", "element-wise", "copies", "sums and softmax", "attention", "compiled", "other"]
    shown = {
        "three blocks": collection["three blocks: profile"],
        "all blocks": collection["all blocks: profile"],
        "OLMoE, last block": experts["last block"],
        "OLMoE, last four": experts["last four blocks"],
    }
    kinds = [kind for kind in kinds if any(kind in one["kinds"] for one in shown.values())]
    yield f"| tracked | device busy | {' | '.join(kinds)} |"
    yield "|---" * (len(kinds) + 2) + "|"
    for name, one in shown.items():
        shares = " | ".join(f"{one['kinds'].get(kind, 0):.0%}" for kind in kinds)
        yield f"| {name} | {min(1.0, one['busy']):.0%} | {shares} |"
    yield ""
    algebra = _read("algebra")
    yield "| eigenbasis | seconds | TFLOP/s by 9 d^3 | residual |"
    yield "|---|---|---|---|"
    for name, one in algebra.items():
        if name.startswith("eigenbasis"):
            size, dtype = name.split()[1:]
            yield f"| {size}, {dtype} | {one['seconds']:.2f} | {one['gflops'] / 1e3:.1f} | {one['residual']:.0e} |"
    yield ""
    yield "| 20 million tokens | computed before | measured rate | efficiency that fits |"
    yield "|---|---|---|---|"
    for name in JOBS:
        one = _read("forecast")[name]
        yield f"| {name} | {one['planned_s']:,.0f} s | {one['measured_s']:,.0f} s | {one['fitted_efficiency']:.0%} |"


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


if __name__ == "__main__":
    print(tables())
