"""Collection speed of a mixture of experts, and where its time goes.

    OMP_NUM_THREADS=1 python -m benchmarks.experts              # CPU, about 5 minutes

An OLMoE-shaped model with random weights. Beside the whole: products of the size that the covariance of an expert has,
on their own, for the share of the limit that they leave. Medians, in turn; writes benchmarks/results/experts_cpu.json.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.collection import tokens
from benchmarks.limits import PRODUCT_SIZE, product
from benchmarks.machine import Times, Watch, medians, pairs, ratios
from lightning_kfac import collect_factors
from lightning_kfac.collection.memory import TOKENS_AT_ONCE
from lightning_kfac.math.covariance import SecondMoment, accumulator_numbers
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning.architecture import read_architecture
from lightning_kfac.planning.cost import token_flops

PROJECTIONS = ("expert_gate", "expert_up", "expert_down")
SHAPE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 8192}  # fmt: skip
JOBS = {"last block": [-1], "whole model": "all"}


def build(dtype: torch.dtype):
    """The benchmark model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", pad_token_id=0, eos_token_id=0, **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def covariances(size: int, rows: int, dtype: torch.dtype, flops: float = 2e10):
    """X^T X of some rows, summed into the accumulators of many experts in turn: what to time, and its FLOPs."""
    sums = [SecondMoment(size) for _ in range(SHAPE["num_experts"])]
    x = torch.randn(rows, size).to(dtype)
    of_a_round = len(sums) * rows * accumulator_numbers(size)
    rounds = max(1, round(flops / of_a_round))

    def run() -> None:
        for _ in range(rounds):
            for moment in sums:
                moment.add(x)

    return run, rounds * of_a_round


def measure(arguments, dtype_name: str) -> dict:
    """All jobs in one dtype."""
    dtype = getattr(torch, dtype_name)
    model = build(dtype)
    paper = read_architecture(model)
    batches = tokens(model.config.vocab_size, arguments.rows, arguments.seq_len, 1)
    count = arguments.rows * (arguments.seq_len - 1)
    at_once = max(1, TOKENS_AT_ONCE["cpu"] // arguments.seq_len) * arguments.seq_len
    an_expert = at_once * SHAPE["num_experts_per_tok"] // SHAPE["num_experts"]
    small, small_flops = covariances(SHAPE["hidden_size"], an_expert, dtype)
    found = {"tokens_of_an_expert_at_once": an_expert, "jobs": {}}
    for job, blocks in JOBS.items():
        tracked = paper.select(resolve_targets(model, blocks, PROJECTIONS))
        flops = token_flops(paper, tracked, arguments.seq_len)._asdict()

        def run(blocks=blocks):
            collect_factors(model, batches, blocks=blocks, projections=PROJECTIONS, labels="gold")

        def forward():
            with torch.no_grad():
                model(**batches[0])

        ways = {"product": product(dtype), "covariances": small, "collection": run, "forward": forward}
        times = pairs(ways, arguments.repeats)
        found["jobs"][job] = figures(times, flops, count, small_flops) | {"layers": len(tracked)}
        shares = ("limit_fraction", "limit_fraction_with_products_of_their_size", "forward_alone_share")
        print(dtype_name, job, {name: round(found["jobs"][job][name]["cpu"], 3) for name in shares}, flush=True)
    return found


def figures(times: Times, flops: dict, count: int, small_flops: float) -> dict:
    """What the times of a job come to, each by wall and by CPU time.

    Args:
        flops: Of a token, by part.
        count: Tokens.
        small_flops: Of the covariances timed on their own.
    """
    seconds = medians(times)
    large = {clock: 2 * PRODUCT_SIZE**3 / min(values) for clock, values in times["product"].items()}
    small = {clock: small_flops / s for clock, s in seconds["covariances"].items()}
    whole = seconds["collection"]
    least = {clock: sum(flops.values()) * count / large[clock] for clock in whole}
    # The same sum, with covariances at the rate that products of their size have on their own.
    extra = {clock: flops["covariance"] * count * (1 / small[clock] - 1 / large[clock]) for clock in whole}
    return {
        "tokens_per_second": {clock: count / s for clock, s in whole.items()},
        "flops_per_token": flops,
        "limit_fraction": {clock: least[clock] / s for clock, s in whole.items()},
        "limit_fraction_with_products_of_their_size": {c: (least[c] + extra[c]) / s for c, s in whole.items()},
        "forward_alone_share": ratios(times, "forward", "collection"),
        "large_product_gflops": {clock: rate / 1e9 for clock, rate in large.items()},
        "covariance_gflops": {clock: rate / 1e9 for clock, rate in small.items()},
        "times": times,
    }


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    results = {
        "rows": arguments.rows,
        "seq_len": arguments.seq_len,
        "repeats": arguments.repeats,
        "shape": SHAPE,
        "dtypes": {},
    }
    for dtype_name in arguments.dtypes:
        results["dtypes"][dtype_name] = measure(arguments, dtype_name)
    path = Path(__file__).parent / "results" / "experts_cpu.json"
    path.write_text(json.dumps({"machine": watch.about(), **results}, indent=2) + "\n", "utf-8")
    print(f"-> {path}")
    watch.conclude(
        "\n".join(
            f"{dtype} {job}: {of['limit_fraction']['cpu']:.0%} of the limit"
            for dtype, jobs in results["dtypes"].items()
            for job, of in jobs["jobs"].items()
        )
    )


if __name__ == "__main__":
    main()
