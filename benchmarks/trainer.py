"""What Lightning costs a batch: tokens a second of ``Trainer.fit`` against the bare engine.

    OMP_NUM_THREADS=1 python -m benchmarks.trainer

Same model, same batches, in turn in one process; medians over seven pairs. Of a run through the Trainer, what counts is
from the first batch to the saved factors.
"""

import json
import tempfile
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.collection import PROJECTIONS, SHAPE, tokens
from benchmarks.machine import Seconds, Watch, pairs, ratios
from lightning_kfac import collect_factors
from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.modules import CausalLM

BLOCKS = [5, 6, 7]
ROWS, SEQ_LEN, BATCHES, REPEATS = 4, 256, 6, 7


class Stopwatch(Callback):
    """Time from the first batch to the saved factors."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.start = Seconds.now()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seconds = Seconds.now().since(self.start)


def with_trainer(architecture: dict, batches: list[dict]) -> Seconds:
    """Time of a collection through ``Trainer.fit``, with logging."""
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


def main() -> None:
    """Runs the benchmark and writes its result."""
    quiet()
    torch.set_num_threads(1)
    watch = Watch()
    architecture = {"model_type": "olmo2", "pad_token_id": 0, "eos_token_id": 0, "dtype": "float32", **SHAPE}
    batches = tokens(architecture["vocab_size"], ROWS, SEQ_LEN, BATCHES)
    model = CausalLM(architecture=architecture)
    model.configure_model()
    ways = {
        "trainer": lambda: with_trainer(architecture, batches),
        "bare": lambda: collect_factors(model.model, batches, blocks=BLOCKS, projections=PROJECTIONS, labels="gold"),
    }
    times = pairs(ways, REPEATS)
    ratio = ratios(times, "bare", "trainer")
    path = Path(__file__).parent / "results" / "trainer.json"
    result = {"machine": watch.about(), "ratio": ratio, "times": times}
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"{ratio} -> {path}")
    watch.conclude(f"Trainer.fit reaches {ratio['cpu']:.3f} of the bare engine's tokens in a second of CPU time")


if __name__ == "__main__":
    main()
