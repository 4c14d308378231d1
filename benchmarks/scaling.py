"""The tables of docs/scaling.md, and the cost model beside what is measured.

python -m benchmarks.scaling                              # the tables, in a second
OMP_NUM_THREADS=1 python -m benchmarks.scaling --measure  # one CPU core, 5 minutes; a file in results/
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.limits import PRODUCT_SIZE, product
from benchmarks.machine import Watch, medians, pairs, ratios
from lightning_kfac import collect_factors, save_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.math.spectrum import eigenbasis
from lightning_kfac.models.loading import load_model, skeleton
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import SHAPES, published_config, read_architecture
from lightning_kfac.planning.hardware import HARDWARE
from lightning_kfac.planning.run import Job, plan_run
from lightning_kfac.planning.tables import readable_seconds

DEVICES = (1, 8, 64, 1024)
TOKENS = 20_000_000
# Three blocks at the depth that the paper chose for OLMo-2, and the whole model.
JOBS = {
    "olmo2-1b": {"blocks": [11, 12, 13], "few": ["gate", "up"], "all": ["gate", "up", "down"]},
    "olmo2-7b": {"blocks": [23, 24, 25], "few": ["gate", "up"], "all": ["gate", "up", "down"]},
    "llama3-70b": {"blocks": [57, 58, 59], "few": ["gate", "up"], "all": ["gate", "up", "down"]},
    "mixtral-8x7b": {"blocks": [23, 24, 25], "few": ["q", "k", "v", "o"], "all": ["q", "k", "v", "o"]},
}
COLUMNS = ("GPUs", "strategy", "passes", "weights", "accumulators", "activations", "all of a rank", "collection",
           "of it communication", "eigenbases, edit", "resume states")  # fmt: skip


# -- tables ----------------------------------------------------------------------------------------------------------


def tables() -> str:
    """All tables as Markdown."""
    return "\n".join(_tables())


def _tables() -> Iterator[str]:
    jobs = dict(_jobs())
    yield "GFLOP a token and GB on disk, one pass:\n"
    yield "| model | layers | forward | backward | covariances | factors | eigenbases | edited model |"
    yield "|---|---|---|---|---|---|---|---|"
    for (name, layers), (model, job) in jobs.items():
        flops = [f"{part / 1e9:,.2f}" for part in cost.token_flops(model, job.tracked, job.seq_len)]
        disk = plan_run(model, job, HARDWARE["h100"], 1024, 8).disk
        sizes = [f"{disk[part] / 1e9:,.1f}" for part in ("factors", "eigenbases", "edited model")]
        yield f"| {name} | {layers} | {' | '.join(flops + sizes)} |"
    for (name, layers), (model, job) in jobs.items():
        yield f"\n**{SHAPES[name][0]}, {layers}**\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for ranks in DEVICES:
            yield _row(plan_run(model, job, HARDWARE["h100"], ranks, min(ranks, 8)))


def _jobs() -> Iterator[tuple[tuple[str, str], tuple[cost.Architecture, Job]]]:
    for name, job in JOBS.items():
        module = skeleton(published_config(name))
        model = read_architecture(module)
        blocks = f"blocks {job['blocks'][0]}-{job['blocks'][-1]}"
        for label, which, projections in ((blocks, job["blocks"], job["few"]), ("all blocks", "all", job["all"])):
            tracked = model.select(resolve_targets(module, which, projections))
            yield (name, f"{label}: {', '.join(projections)}"), (model, Job(tuple(tracked), TOKENS))


def _row(plan) -> str:
    if not plan.fits:
        needed = max(sum(plan.memory.values()), plan.edit_memory)
        return f"| {plan.ranks:,} | does not fit | | | | | needs {needed / 1e9:,.0f} GB | | | | |"
    weights = plan.memory["weights"] + plan.memory.get("gathered weights", 0)
    parts = [weights, plan.memory["accumulators"], plan.memory["activations"], sum(plan.memory.values())]
    memory = " | ".join(f"{part / 1e9:.1f} GB" for part in parts)
    last = plan.seconds["eigenbases"] + plan.seconds["edit"]
    return (
        f"| {plan.ranks:,} | {'' if plan.strategy == 'auto' else plan.strategy} | {len(plan.passes)} | {memory} "
        f"| {readable_seconds(plan.total_seconds - last)} | {plan.communication_share:.1%} | {readable_seconds(last)} "
        f"| {plan.disk['resume states'] / 1e9:,.0f} GB |"
    )


# -- measurements ----------------------------------------------------------------------------------------------------


def build(**changes) -> torch.nn.Module:
    """A model of 8 blocks with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
             "vocab_size": 8192, "pad_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 1024}  # fmt: skip
    config = AutoConfig.for_model("olmo2", **shape | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def demo() -> torch.nn.Module:
    """The embedded model."""
    return load_model("demo").requires_grad_(False)


def run_batches(model: torch.nn.Module, layers: dict, rows: int, seq_len: int, batches: int = 1) -> CurvatureCapture:
    """Collects on random rows of seq_len tokens that count, with gold labels."""
    generator, loss = torch.Generator().manual_seed(1), FisherLoss("gold")
    with CurvatureCapture(layers) as capture:
        engine = CurvatureEngine(model, capture, loss, rows, head_chunk=256)
        for _ in range(batches):
            ids = torch.randint(0, model.config.vocab_size, (rows, seq_len + 1), generator=generator)
            last, _ = engine.run(loss.prepare({"input_ids": ids}))
            last.backward()
    return capture


def counted_flops(model: torch.nn.Module, layers: dict, rows: int, seq_len: int) -> tuple[int, int]:
    """FLOPs of a token by torch's own counter: of matrix products, and of attention's forward (the whole square)."""
    manner_of(model)  # its trial is not part of the collection
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with counter:
        run_batches(model, layers, rows, seq_len)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counts.items() if "attention" not in op)
    attention = sum(flops for op, flops in counts.items() if "attention" in op and "backward" not in op)
    return products // (rows * seq_len), attention // (rows * seq_len)


def _addmm_flops(total, left, right, **_) -> int:
    """In place, which torch's table leaves out; the arguments are shapes."""
    return 2 * left[0] * left[1] * right[1]


def modelled_flops(model: torch.nn.Module, layers: dict) -> float:
    """The same by the cost model: matrix products without attention's own."""
    paper = read_architecture(model)
    return sum(cost.token_flops(paper, paper.select(layers), 0))


WIDE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16}
TIMED = {
    "top block, gate and up": ({}, [7], ["gate", "up"]),
    "top four blocks, gate and up": ({}, [4, 5, 6, 7], ["gate", "up"]),
    "all blocks, gate and up": ({}, "all", ["gate", "up"]),
    "all blocks, gate, up and down": ({}, "all", ["gate", "up", "down"]),
    "all blocks, q, k, v and o": ({}, "all", ["q", "k", "v", "o"]),
    "twice as wide, top four blocks, gate and up": (WIDE, [4, 5, 6, 7], ["gate", "up"]),
    "the demo model (128 wide), blocks 3 and 4, gate and up": (None, [3, 4], ["gate", "up"]),
}


def measure(repeats: int) -> dict:
    """Times beside predictions, one case after the other in every round."""
    models = {
        name: load_model("demo") if changes is None else build(**changes) for name, (changes, *_) in TIMED.items()
    }
    for model in models.values():
        model.requires_grad_(False)
    rows = 4
    seq_len = 256
    ways = {"product": product(torch.float32)}
    flops = {}
    for name, (_, blocks, projections) in TIMED.items():
        layers = resolve_targets(models[name], blocks, projections)
        ways[name] = partial(run_batches, models[name], layers, rows, seq_len)
        paper = read_architecture(models[name])
        flops[name] = sum(cost.token_flops(paper, paper.select(layers), seq_len)) * rows * seq_len
    times = pairs(ways, repeats)
    seconds = medians(times)
    rate = {clock: 2 * PRODUCT_SIZE**3 / s for clock, s in seconds["product"].items()}
    first = next(iter(TIMED))
    cases = {
        name: {
            "seconds": seconds[name],
            "ratio": ratios(times, name, first),
            "predicted_ratio": flops[name] / flops[first],
            "share_of_peak": {clock: flops[name] / s / rate[clock] for clock, s in seconds[name].items()},
            "times": times[name],
        }
        for name in TIMED
    }
    gflops = {clock: value / 1e9 for clock, value in rate.items()}
    return {"product_gflops": gflops, "cases": cases, "eigen_gflops": _eigen_rates(repeats)}


def _eigen_rates(repeats: int) -> dict[int, dict[str, float]]:
    ways = {}
    for size in (512, 1024, 2048):
        x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
        ways[size] = partial(eigenbasis, x.T @ x)
    seconds = medians(pairs(ways, repeats, warm_up=0))
    return {
        size: {clock: cost.EIGEN_FLOPS * size**3 / s / 1e9 for clock, s in of.items()} for size, of in seconds.items()
    }


def folder_sizes() -> dict[str, int]:
    """Bytes of a real factor folder, and of the triangles in it."""
    model = build()
    layers = resolve_targets(model, "all", ["gate", "up", "down"])
    factors = collect_factors(model, [{"input_ids": torch.ones(1, 64, dtype=torch.long)}], labels="gold")
    with tempfile.TemporaryDirectory() as folder:
        save_factors(factors, Path(folder) / "factors")
        real = sum(file.stat().st_size for file in (Path(folder) / "factors").iterdir())
    return {"real": real, "predicted": cost.triangle_bytes(read_architecture(model).select(layers))}


def main() -> None:
    """Prints tables, or measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time the cases beside their predictions")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    arguments = parser.parse_args()
    if not arguments.measure:
        print(tables())
        return
    torch.set_num_threads(1)
    watch = Watch()
    found = {"folder": folder_sizes(), **measure(arguments.repeats)}
    path = Path(__file__).parent / "results" / "scaling.json"
    path.write_text(json.dumps({"machine": watch.about(), **found}, indent=2) + "\n", "utf-8")
    for name, case in found["cases"].items():
        print(f"{name}: {case['seconds']['cpu']:.2f} s of CPU, {case['ratio']['cpu']:.2f} x (predicted "
              f"{case['predicted_ratio']:.2f}), {case['share_of_peak']['cpu']:.0%} of the peak")  # fmt: skip
    print({key: found[key] for key in ("product_gflops", "eigen_gflops", "folder")})
    off = max(abs(case["ratio"]["cpu"] / case["predicted_ratio"] - 1) for case in found["cases"].values())
    watch.conclude(f"ratios of CPU time are within {off:.0%} of what the cost model predicts")


if __name__ == "__main__":
    main()
