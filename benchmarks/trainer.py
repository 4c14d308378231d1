"""What Lightning costs a batch: tokens a second of ``Trainer.fit`` against the bare engine.

    OMP_NUM_THREADS=1 python -m benchmarks.trainer

Same model, same batches, interleaved in one process; medians of seven.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.collection import PROJECTIONS, SHAPES, tokens
from benchmarks.limits import median
from lightning_kfac import collect_factors
from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.modules import CausalLM

BLOCKS = [5, 6, 7]
ROWS, SEQ_LEN, BATCHES, REPEATS = 4, 256, 6, 7


class Stopwatch(Callback):
    """Seconds from the first batch to the saved factors."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seconds = time.perf_counter() - self.start


def with_trainer(architecture: dict, batches: list[dict]) -> float:
    """Seconds of a collection through ``Trainer.fit``, with logging."""
    folder, watch = tempfile.mkdtemp(), Stopwatch()
    collector = CurvatureCollector(blocks=BLOCKS, projections=PROJECTIONS)
    trainer = Trainer(
        **TRAINER_DEFAULTS,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder),
        callbacks=[collector, watch],
        enable_progress_bar=False,
        accelerator="cpu",
    )
    module = CausalLM(architecture=architecture, labels="gold")
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return watch.seconds


def bare(model, batches: list[dict]) -> float:
    """Seconds of ``collect_factors``."""
    start = time.perf_counter()
    collect_factors(model, batches, blocks=BLOCKS, projections=PROJECTIONS, labels="gold")
    return time.perf_counter() - start


def main() -> None:
    """Runs the benchmark and writes its result."""
    quiet()
    torch.set_num_threads(1)
    architecture = {"model_type": "olmo2", "pad_token_id": 0, "eos_token_id": 0, "dtype": "float32", **SHAPES["cpu"]}
    batches = tokens("cpu", architecture["vocab_size"], ROWS, SEQ_LEN, BATCHES)
    model = CausalLM(architecture=architecture)
    model.configure_model()
    times = {"trainer": [], "bare": []}
    for i in range(REPEATS + 1):
        taken = {"trainer": with_trainer(architecture, batches), "bare": bare(model.model, batches)}
        for name, seconds in taken.items():
            times[name] += [seconds] if i else []  # the first is to warm up
    ratio = median(times["bare"]) / median(times["trainer"])
    path = Path(__file__).parent / "results" / "trainer.json"
    path.write_text(json.dumps({"ratio": ratio, "times": times}, indent=2))
    print(f"Trainer.fit reaches {ratio:.3f} of the bare engine's tokens a second -> {path}")


if __name__ == "__main__":
    main()
