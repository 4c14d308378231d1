"""MiningWriter: keeps the windows that a model recites, as a memorized set."""

import json
from pathlib import Path

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from lightning_kfac.progress import console

MINED = "memorized.jsonl"


class MiningWriter(Callback):
    """Writes the windows found by ``predict`` to ``<run>/memorized.jsonl``.

    Each row holds ``prefix_ids``, ``suffix_ids``, their text, and ``offset``, the window's first
    position in the tokenized corpus.

    Attributes:
        found: This rank's rows so far.
    """

    def __init__(self):
        self.found: list[dict] = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.found += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self.found
        if dist.is_initialized():
            gathered = [None] * trainer.world_size
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        if not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer
        lines = [
            json.dumps(
                row | {"prefix": tokenizer.decode(row["prefix_ids"]), "suffix": tokenizer.decode(row["suffix_ids"])},
                ensure_ascii=False,
            )
            for row in sorted(rows, key=lambda row: row["offset"])
        ]
        path = Path(trainer.default_root_dir) / MINED
        partial = path.with_suffix(".part")
        partial.write_text("".join(line + "\n" for line in lines), "utf-8")
        partial.replace(path)
        windows = len(trainer.predict_dataloaders.dataset)
        console.print(f"{len(lines):,} of {windows:,} windows are recited word for word -> {path}")
