"""Does a long collection grow? Memory, open files, threads and files on the disk over thousands of batches.

    OMP_NUM_THREADS=1 python -m benchmarks.soak                  # 3,000 batches, about a minute

A small model through ``Trainer.fit`` as ``train.py`` runs it, with TensorBoard, and the state saved every second, so
that everything that could grow is at work. Counts are taken every 100 batches; the first third of them, while
allocators and caches fill, is not judged. Exits with 1 where something grows; writes benchmarks/results/soak.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData

# What noise of the allocator explains.
MOST_GROWTH = 4.0
MODEL = {
    "model_type": "olmo2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}


class Counts(Callback):
    """Takes counts of this process every so many batches.

    Attributes:
        rows: By count: batch, resident memory in MB, open files, threads, files in the folder.
    """

    def __init__(self, folder: Path, every: int):
        self.folder = folder
        self.every = every
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.rows.append({"batch": batch_idx + 1, **counts(self.folder)})


def counts(folder: Path) -> dict[str, float]:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mb": pages * resource.getpagesize() / 2**20,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "files_on_disk": sum(path.is_file() for path in folder.rglob("*")),
    }


def soak(folder: Path, batches: int, every: int, save_seconds: float = 1.0) -> list[dict[str, float]]:
    """One collection of so many batches; its counts."""
    watch = Counts(folder, every)
    trainer = Trainer(
        **TRAINER_DEFAULTS,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="tensorboard"),
        callbacks=[CurvatureCollector(blocks="all", save_minutes=save_seconds / 60), watch],
        enable_progress_bar=False,
        accelerator="cpu",
        devices=1,
    )
    rows = 2
    seq_len = 32
    data = TextData(
        max_tokens=batches * rows * seq_len,
        seq_len=seq_len,
        batch_size=rows,
        tokenizer="demo",
    )
    trainer.fit(CausalLM(architecture=MODEL), data)
    return watch.rows


def growth(rows: list[dict[str, float]], name: str) -> float:
    """Of the last two thirds: what the median of their second half has over that of their first."""
    judged = [row[name] for row in rows[len(rows) // 3 :]]
    middle = len(judged) // 2
    return statistics.median(judged[middle:]) - statistics.median(judged[:middle])


def grown(rows: list[dict[str, float]]) -> list[str]:
    """What grows, in words; empty where nothing does."""
    limits = {"resident_mb": MOST_GROWTH, "open_files": 0, "threads": 0, "files_on_disk": 0}
    found = {name: growth(rows, name) for name in limits}
    return [f"{name} grew by {found[name]:g}" for name, limit in limits.items() if found[name] > limit]


def main() -> None:
    """Soaks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(Path(folder), arguments.batches, arguments.every)
    for row in rows:
        print("batch {batch:5.0f}: {resident_mb:7.1f} MB, {open_files} open files, {threads} threads, "
              "{files_on_disk} files on the disk".format(**row))  # fmt: skip
    wrong = grown(rows)
    print("; ".join(wrong) or f"nothing grows over {rows[-1]['batch']} batches")
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    seconds = round(time.perf_counter() - start, 1)
    result = {**about, "seconds": seconds, "grown": wrong, "rows": rows}
    path = Path(__file__).parent / "results" / "soak.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
