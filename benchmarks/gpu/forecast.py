"""(f) What 20 million tokens will take: the rates that were measured, beside what docs/scaling.md's model says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part
from lightning_kfac.models.loading import skeleton
from lightning_kfac.planning.architecture import published_config, read_architecture
from lightning_kfac.planning.hardware import HARDWARE
from lightning_kfac.planning.run import Job, plan_run

TOKENS = 20_000_000
JOBS = {"three blocks": [23, 24, 25], "all blocks": list(range(32))}


def run(part: Part) -> None:
    """One step for each job."""
    measured = _read(part.output / "collection.json")
    algebra = _read(part.output / "algebra.json")
    for name, blocks in JOBS.items():
        part.step(name, lambda name=name, blocks=blocks: job(name, blocks, measured, algebra))


def job(name: str, blocks: list[int], measured: dict[str, Any], algebra: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the parts, and the efficiency and the rate of eigenbases at which the model would say the same."""
    from lightning_kfac.models.targets import resolve_targets

    module = skeleton(published_config("olmo2-7b"))
    model = read_architecture(module)
    layers = resolve_targets(module, blocks, ("gate", "up", "down"))
    hardware = HARDWARE["h100"]
    plan = plan_run(model, Job(tuple(model.select(layers)), TOKENS, rows=32), hardware, 1, 1)
    assumed = {part: plan.seconds[part] for part in ("forward", "backward", "covariances")}
    found: dict[str, Any] = {"tokens": TOKENS, "planned_s": sum(assumed.values())}
    found["planned_eigen_s"] = plan.seconds["eigenbases"]
    rate = measured.get(f"{name}: ours", {}).get("sampled", {}).get("tokens_per_second")
    if rate:
        found["measured_s"] = TOKENS / rate * len(plan.passes)
        found["fitted_efficiency"] = hardware.efficiency * found["planned_s"] / found["measured_s"]
    eigen = next((algebra[key]["gflops"] for key in algebra if key.startswith("eigenbasis 11008 float64")
                  and "gflops" in algebra[key]), None)  # fmt: skip
    if eigen:
        found["fitted_eigen"] = eigen * 1e9
        fitted = replace(hardware, eigen=eigen * 1e9)
        found["eigen_s"] = plan_run(model, Job(tuple(model.select(layers)), TOKENS), fitted, 1, 1).seconds["eigenbases"]
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
