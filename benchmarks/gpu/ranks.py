"""(e) NCCL and FSDP2 with one rank, and the command that users run, on the GPU."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.correctness import DENSE
from benchmarks.gpu.parts import Part, error, random_model, random_rows
from lightning_kfac import collect_factors
from lightning_kfac.distributed.sharding import shard
from lightning_kfac.math.covariance import SecondMoment


def run(part: Part) -> None:
    """All steps."""
    part.step("train.py fit, quickstart", lambda: fit(part, ()))
    part.step("train.py fit, ddp", lambda: fit(part, ("--trainer.strategy", "ddp")))
    part.step("train.py fit, fsdp", lambda: fit(part, ("--trainer.strategy", "fsdp")))
    part.step("in one process", lambda: one_rank(part))


def fit(part: Part, more: tuple[str, ...]) -> dict[str, Any]:
    """The quickstart's run: what it measured before and after the edit."""
    if part.device == "cpu":
        return {"left_out": "other tests run it on a CPU"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml"]
        where = ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
        begin = time.monotonic()
        done = subprocess.run(
            [*command, *where, "--trainer.default_root_dir", folder, *more],
            capture_output=True,
            text=True,
            timeout=150,
            env=os.environ | {"COLUMNS": "80"},
        )
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-1200:])
        rows = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
    wanted = ("stage", "strict_acc", "unseen/strict_acc", "perplexity", "ndcg@10")
    figures = [{key: row[key] for key in wanted if key in row} for row in rows]
    return {"seconds": time.monotonic() - begin, "results": figures}


def one_rank(part: Part) -> dict[str, Any]:
    """A reduction by NCCL (gloo on a CPU) changes nothing; factors of a sharded model are those of the whole one."""
    from torch.distributed.device_mesh import init_device_mesh

    with tempfile.NamedTemporaryFile() as store:
        backend = "nccl" if part.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            moment = SecondMoment(300, part.device)
            moment.add(torch.randn(50, 300, device=part.device))
            packed = moment.packed()
            summed = packed.clone()
            dist.all_reduce(summed)
            model = random_model("olmo2", DENSE, part.device, torch.float32)
            rows = [random_rows(model.config.vocab_size, 4, 64, part.device)]
            whole = collect_factors(model, rows, blocks=[2, 3], labels="gold")
            shard(model, list(model.model.layers), init_device_mesh(part.device, (1,)))
            spread = collect_factors(model, rows, blocks=[2, 3], labels="gold")
            apart = max(max(error(spread[n].A, f.A), error(spread[n].G, f.G)) for n, f in whole.items())
        finally:
            dist.destroy_process_group()
    return {"reduced_equal": torch.equal(packed, summed), "sharded_apart": apart, "right": apart < 1e-6}
