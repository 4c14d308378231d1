"""Collection speed: ours, the conventional way, kronfluence and bergson, in turn in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.collection              # CPU, about 25 minutes

Same model, same tokens, same (gold) labels; medians over pairs. Writes benchmarks/results/collection_cpu.json; a GPU is
asked by ``benchmarks.gpu``. How to get
the two packages without another torch is in benchmarks/README.md.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.conventional import conventional_factors
from benchmarks.limits import PRODUCT_SIZE, least_flops_per_token, product
from benchmarks.machine import Watch, medians, pairs, ratios
from benchmarks.with_bergson import bergson_available, bergson_factors
from benchmarks.with_kronfluence import kronfluence_available, kronfluence_factors, prepare
from lightning_kfac import collect_factors

PROJECTIONS = ("gate", "up", "down")
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
         "vocab_size": 8192}  # fmt: skip
JOBS = {"top three blocks": [5, 6, 7], "whole model": list(range(8))}


def build(dtype: torch.dtype):
    """The benchmark model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", max_position_embeddings=1024, pad_token_id=0, eos_token_id=0, **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def tokens(vocabulary: int, rows: int, seq_len: int, batches: int) -> list[dict]:
    """Random rows."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, seq_len)
    return [{"input_ids": torch.randint(0, vocabulary, shape, generator=generator)} for _ in range(batches)]


def methods(model, batches: list[dict], blocks: list[int], dtype: torch.dtype, names: list[str]) -> dict:
    """What is timed, by name."""

    def ours():
        collect_factors(model, batches, blocks=blocks, projections=PROJECTIONS, labels="gold")

    own = copy.deepcopy(model) if len(names) > 1 else model  # it leaves hooks behind

    def conventional():
        conventional_factors(own, batches, blocks, PROJECTIONS, blocks_per_pass=2)

    found = {"ours": ours, "conventional": conventional}
    layers = [f"model.layers.{b}.mlp.{p}_proj" for b in blocks for p in PROJECTIONS]
    if "kronfluence" in names:
        wrapped, task = prepare(copy.deepcopy(model), layers)
        found["kronfluence"] = lambda: kronfluence_factors(wrapped, task, batches, dtype)
    if "bergson" in names:
        frozen = copy.deepcopy(model)
        found["bergson"] = lambda: bergson_factors(frozen, layers, batches)
    return {name: found[name] for name in names if name in found}


def available() -> list[str]:
    """Ours, the conventional way, and which of the others are installed."""
    others = {"kronfluence": kronfluence_available, "bergson": bergson_available}
    return ["ours", "conventional", *(name for name, there in others.items() if there())]


def measure(arguments, dtype_name: str) -> dict:
    """All jobs in one dtype."""
    dtype = getattr(torch, dtype_name)
    model = build(dtype)
    batches = tokens(model.config.vocab_size, arguments.rows, arguments.seq_len, arguments.batches)
    count = arguments.rows * (arguments.seq_len - 1) * arguments.batches
    found = {}
    for job, blocks in JOBS.items():
        ways = methods(model, batches, blocks, dtype, available())
        times = pairs({"product": product(dtype), **ways}, arguments.repeats)
        rate = {clock: 2 * PRODUCT_SIZE**3 / min(values) for clock, values in times["product"].items()}
        seconds = medians(times)
        flops = least_flops_per_token(model.config, min(blocks), arguments.seq_len, blocks, PROJECTIONS)
        least = sum(flops.values()) * count
        found[job] = {
            "product_gflops": {clock: value / 1e9 for clock, value in rate.items()},
            "tokens_per_second": {way: {clock: count / s for clock, s in seconds[way].items()} for way in ways},
            "ratio": {way: ratios(times, way, "ours") for way in ways},
            "flops_per_token": flops,
            "limit_fraction": {clock: least / s / rate[clock] for clock, s in seconds["ours"].items()},
            "times": times,
        }
        shown = {way: round(of["cpu"], 2) for way, of in found[job]["ratio"].items()}
        print(
            dtype_name,
            job,
            "CPU time beside ours:",
            shown,
            f"limit {found[job]['limit_fraction']['cpu']:.2f}",
            flush=True,
        )
    return {"jobs": found}


def peak_memory(arguments, dtype_name: str, job: str, name: str) -> float:
    """Peak memory of a method beyond the model's weights, in MB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.collection", "--memory-of", name, "--memory-job", job,
               "--dtypes", dtype_name, "--rows", str(arguments.rows), "--seq-len", str(arguments.seq_len)]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout.split()[-1])


def report_memory(arguments) -> None:
    """Prints the peak memory of one method in this process beyond the built model, in MB."""
    (dtype_name,) = arguments.dtypes
    dtype = getattr(torch, dtype_name)
    model = build(dtype)
    batches = tokens(model.config.vocab_size, arguments.rows, arguments.seq_len, 1)
    model(input_ids=batches[0]["input_ids"][:1, :8])  # whatever a first run allocates for good
    run = methods(model, batches, JOBS[arguments.memory_job], dtype, [arguments.memory_of])
    gc.collect()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run[arguments.memory_of]()
    print((_resident("VmHWM") - before) / 1e6)


def _resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--memory-job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        report_memory(arguments)
        return
    watch = Watch()
    results = {
        "rows": arguments.rows,
        "seq_len": arguments.seq_len,
        "batches": arguments.batches,
        "repeats": arguments.repeats,
        "dtypes": {},
    }
    for dtype_name in arguments.dtypes:
        results["dtypes"][dtype_name] = measure(arguments, dtype_name)
        memory = {job: {name: peak_memory(arguments, dtype_name, job, name) for name in available()} for job in JOBS}
        results["dtypes"][dtype_name]["peak_memory_mb"] = memory
        print(dtype_name, "peak memory, MB", memory, flush=True)
    path = Path(__file__).parent / "results" / "collection_cpu.json"
    path.write_text(json.dumps({"machine": watch.about(), **results}, indent=2) + "\n", "utf-8")
    print(f"-> {path}")
    watch.conclude(verdict(results))


def verdict(results: dict) -> str:
    """How much faster ours is than the conventional way, in every job, by CPU time."""
    found = [
        f"{dtype} {job}: {of['ratio']['conventional']['cpu']:.2f} x the conventional way, "
        f"{of['limit_fraction']['cpu']:.0%} of the limit"
        for dtype, jobs in results["dtypes"].items()
        for job, of in jobs["jobs"].items()
    ]
    return "\n".join(found)


if __name__ == "__main__":
    main()
