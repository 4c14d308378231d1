"""Collection speed of a mixture of experts, and where its time goes.

    OMP_NUM_THREADS=1 python -m benchmarks.experts              # CPU, about 5 minutes

An OLMoE-shaped model with random weights. Beside the whole: products of the size that the covariance of an expert has,
on their own, for the share of the limit that they leave. Medians; writes benchmarks/results/experts_*.json.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.collection import timed, tokens
from benchmarks.limits import median, product_rate
from lightning_kfac import collect_factors
from lightning_kfac.collection.memory import TOKENS_AT_ONCE
from lightning_kfac.math.covariance import SecondMoment, accumulator_numbers
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning.architecture import read_architecture
from lightning_kfac.planning.cost import token_flops

PROJECTIONS = ("expert_gate", "expert_up", "expert_down")
SHAPES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 8192},
    "cuda": {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304},
}  # fmt: skip
JOBS = {"last block": [-1], "whole model": "all"}


def build(device: str, dtype: torch.dtype):
    """The benchmark model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", pad_token_id=0, eos_token_id=0, **SHAPES[device])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def covariance_rate(size: int, rows: int, dtype: torch.dtype, device: str, least: float = 0.3) -> float:
    """FLOP/s of X^T X of some rows, summed into the accumulators of many experts in turn."""
    sums = [SecondMoment(size, device) for _ in range(SHAPES[device]["num_experts"])]
    x = torch.randn(rows, size, device=device).to(dtype)
    for moment in sums:
        moment.add(x)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        for moment in sums:
            moment.add(x)
        if device == "cuda":
            torch.cuda.synchronize()
        done += len(sums)
    return done * rows * accumulator_numbers(size) / (time.perf_counter() - start)


def measure(arguments, dtype_name: str) -> dict:
    """All jobs in one dtype."""
    device, dtype = arguments.device, getattr(torch, dtype_name)
    model = build(device, dtype)
    paper = read_architecture(model)
    batches = tokens(device, model.config.vocab_size, arguments.rows, arguments.seq_len, 1)
    count = arguments.rows * (arguments.seq_len - 1)
    shape = SHAPES[device]
    at_once = max(1, TOKENS_AT_ONCE[device] // arguments.seq_len) * arguments.seq_len
    an_expert = at_once * shape["num_experts_per_tok"] // shape["num_experts"]
    found = {"tokens_of_an_expert_at_once": an_expert, "jobs": {}}
    for job, blocks in JOBS.items():
        tracked = paper.select(resolve_targets(model, blocks, PROJECTIONS))
        flops = token_flops(paper, tracked, arguments.seq_len)._asdict()

        def run(blocks=blocks):
            collect_factors(model, batches, blocks=blocks, projections=PROJECTIONS, labels="gold")

        def forward():
            with torch.no_grad():
                model(**batches[0])

        for warm in (run, forward):
            timed(warm, device)
        seconds, alone, large, small = [], [], [], []
        for _ in range(arguments.repeats):
            large.append(product_rate(dtype, device, repeats=2))
            small.append(covariance_rate(shape["hidden_size"], an_expert, dtype, device))
            seconds.append(timed(run, device))
            alone.append(timed(forward, device))
        least = sum(flops.values()) * count / max(large)
        # The same sum, with covariances at the rate that products of their size have on their own.
        sized = least + flops["covariance"] * count * (1 / median(small) - 1 / max(large))
        found["jobs"][job] = {
            "layers": len(tracked),
            "tokens_per_second": count / median(seconds),
            "flops_per_token": flops,
            "limit_fraction": least / median(seconds),
            "limit_fraction_with_products_of_their_size": sized / median(seconds),
            "forward_alone_share": median(alone) / median(seconds),
            "large_product_gflops": max(large) / 1e9,
            "covariance_gflops": median(small) / 1e9,
            "times": seconds,
        }
        print(
            dtype_name, job, {k: round(v, 3) for k, v in found["jobs"][job].items() if isinstance(v, float)}, flush=True
        )
    return found


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    results = {
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "rows": arguments.rows,
        "seq_len": arguments.seq_len,
        "repeats": arguments.repeats,
        "shape": SHAPES[arguments.device],
        "dtypes": {},
    }
    for dtype_name in arguments.dtypes or (["float32", "bfloat16"] if on_cpu else ["bfloat16"]):
        results["dtypes"][dtype_name] = measure(arguments, dtype_name)
    path = Path(__file__).parent / "results" / f"experts_{arguments.device}.json"
    path.write_text(json.dumps(results, indent=2))
    print(f"-> {path}")


if __name__ == "__main__":
    main()
