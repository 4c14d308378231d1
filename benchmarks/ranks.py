"""What a second process brings: tokens a second of a collection on two ranks against one, and where the rest goes.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks [--tokens 65536] [--repeats 5]

The same text through ``Trainer.fit``, one thread a process, gloo; runs of one and of two ranks in turn, medians over
pairs. Time counts from the second batch to the saved factors: the batches, then the end, in which sums are added over
ranks and rank 0 writes. Communication is the time inside torch.distributed, which is mostly waiting for the other rank.
Two ranks need two cores: on a busy machine the ratio of wall times says nothing. The ratio of CPU times, one rank's
beside the larger of two, is what a second rank would bring if none ever waited.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from benchmarks.collection import PROJECTIONS, SHAPE
from benchmarks.machine import Seconds, Watch
from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.callbacks.collection.course import Course
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.distributed.strategies import FrozenDDPStrategy
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData

BLOCKS = [5, 6, 7]
COLLECTIVES = ("all_reduce", "broadcast", "reduce", "barrier", "all_gather_object", "broadcast_object_list")
PARTS = ("whole", "collectives", "end")


class Stopwatch(Callback):
    """Time from the second batch to the saved factors, and of it that in collectives and that of the end."""

    def __init__(self):
        self.parts = {part: [] for part in PARTS}
        self._open: set[str] = set()
        for name in COLLECTIVES:
            setattr(dist, name, self._timed("collectives", getattr(dist, name)))
        Course.finish = self._timed("end", Course.finish)

    def _timed(self, part, function):
        def call(*args, **kwargs):
            if part in self._open:  # one collective calls another
                return function(*args, **kwargs)
            self._open.add(part)
            begin = Seconds.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._open.remove(part)
                self.parts[part].append(Seconds.now().since(begin))

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 1:
            self.begin = Seconds.now()
            self.parts["collectives"].clear()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.parts["whole"] = [Seconds.now().since(self.begin)]

    def sums(self) -> dict[str, dict[str, float]]:
        """Seconds of each part by both clocks."""
        return {
            part: {clock: sum(getattr(one, clock) for one in taken) for clock in Seconds._fields}
            for part, taken in self.parts.items()
        }


def rank() -> None:
    """One process of a run."""
    quiet()
    torch.set_num_threads(1)
    watch = Stopwatch()
    ranks = int(os.environ["WORLD_SIZE"])
    architecture = {"model_type": "olmo2", "pad_token_id": 0, "eos_token_id": 0, "dtype": "float32", **SHAPE}
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
    data = TextData(max_tokens=int(os.environ["TOKENS"]), seq_len=256, batch_size=4, tokenizer="demo")
    trainer.fit(CausalLM(architecture=architecture, labels="gold"), data)
    measured = {"batches": trainer.global_step, "seconds": watch.sums()}
    Path(os.environ["FOLDER"], f"rank{trainer.global_rank}.json").write_text(json.dumps(measured))


def run(ranks: int, tokens: int) -> dict:
    """What one run takes: tokens that were timed, and the seconds of each rank."""
    folder = tempfile.mkdtemp()
    env = os.environ | {"OMP_NUM_THREADS": "1", "FOLDER": folder, "WORLD_SIZE": str(ranks), "TOKENS": str(tokens)}
    if ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "NODE_RANK": "0"}
    command = [sys.executable, "-m", "benchmarks.ranks", "rank"]
    each = [env | ({"LOCAL_RANK": str(number)} if ranks > 1 else {}) for number in range(ranks)]
    processes = [subprocess.Popen(command, env=own) for own in each]
    if any(process.wait(1800) for process in processes):
        raise RuntimeError("a rank failed")
    found = [json.loads(Path(folder, f"rank{number}.json").read_text()) for number in range(ranks)]
    batches = found[0]["batches"]
    return {"tokens": tokens * (batches - 1) / batches, "ranks": [one["seconds"] for one in found]}


def rate(found: dict, clock: str) -> float:
    """Tokens in a second of the slowest rank."""
    return found["tokens"] / max(one["whole"][clock] for one in found["ranks"])


def shares(found: dict, part: str) -> float:
    """The share of a part in the wall time, on the rank where it is larger."""
    return max(one[part]["wall"] / one["whole"]["wall"] for one in found["ranks"])


def summary(runs: dict[int, list[dict]]) -> dict:
    """Medians: tokens a second, what the second rank brings by both clocks, and shares of two ranks' time."""
    paired = list(zip(runs[1], runs[2], strict=True))
    clocks = Seconds._fields
    return {
        "tokens_per_second": {n: {c: statistics.median(rate(one, c) for one in runs[n]) for c in clocks} for n in runs},
        "ratio": {c: statistics.median(rate(two, c) / rate(one, c) for one, two in paired) for c in clocks},
        "shares_of_two": {part: statistics.median(shares(one, part) for one in runs[2]) for part in PARTS[1:]},
    }


def main() -> None:
    """Runs the benchmark and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    watch = Watch()
    runs: dict[int, list[dict]] = {1: [], 2: []}
    for number in range(arguments.repeats):
        for ranks in (1, 2) if number % 2 == 0 else (2, 1):
            runs[ranks].append(run(ranks, arguments.tokens))
            print(ranks, {clock: round(rate(runs[ranks][-1], clock)) for clock in Seconds._fields}, flush=True)
    found = summary(runs)
    path = Path(__file__).parent / "results" / "ranks.json"
    path.write_text(json.dumps({"machine": watch.about(), **found, "runs": runs}, indent=2) + "\n", "utf-8")
    print(f"{found} -> {path}")
    watch.conclude(f"two ranks: {found['ratio']['wall']:.2f} times one rank's tokens a second")


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
