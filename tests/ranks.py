"""Processes that compute together, for tests: each runs one function of a test module."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tests.forks import ROOT, free_port


def run_ranks(module: str, folder: Path, ranks: int, timeout: float = 240) -> None:
    """Runs ``python -m MODULE FOLDER`` in so many processes, as a launcher would; all must succeed."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    logs = [open(folder / f"rank{rank}.log", "w+") for rank in range(ranks)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=common | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
    assert not any(codes), "\n".join(f"rank {r}:\n{log.read()[-4000:]}" for r, log in enumerate(logs))


def regroup(size: int, port: int) -> None:
    """From here on only the first ``size`` ranks compute together, or a process alone where size is 1."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    if size == 1:
        for name in ("LOCAL_RANK", "RANK", "NODE_RANK"):
            os.environ.pop(name, None)
        rank_zero_only.rank = 0
