"""What a second process brings: tokens a second of a collection on two ranks against one, and what they spend waiting.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks

The same text through ``Trainer.fit``, one thread a process, gloo; runs of one and of two ranks in turn, medians of
five. Time counts from the second batch to the saved factors. Communication is the time inside torch.distributed,
which is mostly waiting for the other rank.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from benchmarks.collection import PROJECTIONS, SHAPES
from benchmarks.limits import median
from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.distributed.strategies import FrozenDDPStrategy
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData

BLOCKS, TOKENS, REPEATS = [5, 6, 7], 16 * 1024, 5
COLLECTIVES = ("all_reduce", "broadcast", "reduce", "barrier", "all_gather_object", "broadcast_object_list")


class Stopwatch(Callback):
    """Seconds from the second batch to the saved factors, and of these inside of collectives."""

    def __init__(self):
        self.inside, self._depth = 0.0, 0
        for name in COLLECTIVES:
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, collective):
        def call(*args, **kwargs):
            start, self._depth = time.perf_counter(), self._depth + 1
            try:
                return collective(*args, **kwargs)
            finally:
                self._depth -= 1
                self.inside += 0.0 if self._depth else time.perf_counter() - start

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 1:
            self.start, self.inside = time.perf_counter(), 0.0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seconds, self.inside_collectives = time.perf_counter() - self.start, self.inside


def rank() -> None:
    """One process of a run."""
    quiet()
    torch.set_num_threads(1)
    watch, ranks = Stopwatch(), int(os.environ["WORLD_SIZE"])
    architecture = {"model_type": "olmo2", "pad_token_id": 0, "eos_token_id": 0, "dtype": "float32", **SHAPES["cpu"]}
    trainer = Trainer(
        **TRAINER_DEFAULTS,
        default_root_dir=os.environ["FOLDER"],
        logger=False,
        callbacks=[CurvatureCollector(blocks=BLOCKS, projections=PROJECTIONS), watch],
        enable_progress_bar=False,
        accelerator="cpu",
        devices=ranks,
        strategy=FrozenDDPStrategy() if ranks > 1 else "auto",
    )
    data = TextData(max_tokens=TOKENS, seq_len=256, batch_size=4, tokenizer="demo")
    trainer.fit(CausalLM(architecture=architecture, labels="gold"), data)
    measured = {"seconds": watch.seconds, "communication": watch.inside_collectives, "batches": trainer.global_step}
    Path(os.environ["FOLDER"], f"rank{trainer.global_rank}.json").write_text(json.dumps(measured))


def run(ranks: int) -> dict:
    """Tokens a second of a run and the share of its time in collectives, on the rank where it is larger."""
    folder = tempfile.mkdtemp()
    env = os.environ | {"OMP_NUM_THREADS": "1", "FOLDER": folder, "WORLD_SIZE": str(ranks)}
    env |= (
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "NODE_RANK": "0"}
        if ranks > 1
        else {}
    )
    command = [sys.executable, "-m", "benchmarks.ranks", "rank"]
    each = [env | ({"LOCAL_RANK": str(number)} if ranks > 1 else {}) for number in range(ranks)]
    processes = [subprocess.Popen(command, env=own) for own in each]
    if any(process.wait(300) for process in processes):
        raise RuntimeError("a rank failed")
    found = [json.loads(Path(folder, f"rank{number}.json").read_text()) for number in range(ranks)]
    batches, seconds = found[0]["batches"], max(one["seconds"] for one in found)
    share = max(one["communication"] / one["seconds"] for one in found)
    return {"tokens_a_second": TOKENS * (batches - 1) / batches / seconds, "communication": share}


def main() -> None:
    """Runs the benchmark and writes its result."""
    runs = {1: [], 2: []}
    for _ in range(REPEATS):
        for ranks, done in runs.items():
            done.append(run(ranks))
            print(ranks, done[-1], flush=True)
    rates = {ranks: median([one["tokens_a_second"] for one in done]) for ranks, done in runs.items()}
    share = median([one["communication"] for one in runs[2]])
    path = Path(__file__).parent / "results" / "ranks.json"
    path.write_text(json.dumps({"ratio": rates[2] / rates[1], "communication": share, "runs": runs}, indent=2) + "\n")
    print(
        f"two ranks: {rates[2] / rates[1]:.2f} times one rank's tokens a second, {share:.1%} in collectives -> {path}"
    )


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
