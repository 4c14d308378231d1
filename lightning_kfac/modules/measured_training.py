"""A training on sequences that is measured on its way, and goes on where it was stopped."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_kfac.console import say
from lightning_kfac.errors import InputError
from lightning_kfac.modules.sequence_training import SequenceTraining
from lightning_kfac.storage.files import content_hash, new_file
from lightning_kfac.storage.json_files import read_json, write_json
from lightning_kfac.storage.manifest import remove_ours

# Told after how many steps, and the model as it then is.
Measure = Callable[[int, nn.Module], object]


class MeasureSteps(Callback):
    """Measures what is trained after some numbers of steps, and keeps what a training goes on from.

    Args:
        steps: When.
        measure: Called with the number of steps and the model.
        checkpoints: Where to keep it after each measurement; None keeps nothing.
        every: Keep it after so many steps as well.
    """

    def __init__(
        self, steps: Sequence[int], measure: Measure, checkpoints: "Checkpoints | None" = None, every: int | None = None
    ):
        self.steps = frozenset(steps)
        self.every = every
        self.measure = measure
        self.checkpoints = checkpoints

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._at(0, trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._at(trainer.global_step, trainer, pl_module)

    def _at(self, step: int, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = step in self.steps
        if measured and isinstance(pl_module, SequenceTraining):
            with pl_module.as_stored() as model:
                self.measure(step, model)
        if self.checkpoints is not None and step and (measured or (self.every and step % self.every == 0)):
            self.checkpoints.save(step, trainer)


@dataclass(frozen=True)
class Checkpoints:
    """What an interrupted training goes on from: weights, optimizer and step, of the latest measurement.

    Each is a file of Lightning's and a record with its checksum, which appears after it.

    Attributes:
        folder: Where they are.
        key: Identifies the training, but for its number of steps.
        what: What it is, for messages.
    """

    folder: Path
    key: str
    what: str = "relearning"

    def save(self, step: int, trainer: Trainer) -> None:
        """Keeps the state after a step in the place of an earlier one."""
        older = self._files()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.key}-{step:08}.ckpt"
        with new_file(path) as partial:
            trainer.save_checkpoint(partial, weights_only=False)  # also the optimizer's state
        write_json(path.with_suffix(".json"), {"step": step, "content": content_hash([path])})
        for file in older:
            if file.stem != path.stem:
                remove_ours(file)

    def before(self, step: int) -> Path | None:
        """The file of the latest state before a step; None where there is none, or a damaged one, which is said."""
        records = [file for file in self._files() if file.suffix == ".json" and _step_of(file) < step]
        if not records:
            return None
        record = max(records, key=_step_of)
        path = record.with_suffix(".ckpt")
        try:
            if read_json(record, "remove it")["content"] == content_hash([path]):
                return path
        except (InputError, KeyError, OSError):
            pass
        say(f"{path}: damaged; the {self.what} begins again")
        return None

    def remove(self) -> None:
        """Removes what was kept."""
        for file in self._files():
            remove_ours(file)
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return [file for kind in ("ckpt", "json") for file in self.folder.glob(f"{self.key}-{'[0-9]' * 8}.{kind}")]


def _step_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def train_and_measure(
    module: SequenceTraining,
    steps: Sequence[int],
    measure: Measure,
    folder: Path,
    accelerator: str = "auto",
    checkpoints: Checkpoints | None = None,
    every: int | None = None,
) -> None:
    """Trains on one device, measures on the way, and goes on from a checkpoint that an earlier call has left.

    Args:
        steps: When to measure.
        folder: Default root of the Trainer.
        checkpoints: Where to keep, and find, what it goes on from; removed at the end.
        every: Keep it not only after each measurement but also after so many steps.
    """
    if not max(steps):  # nothing to train
        with module.as_stored() as model:
            measure(0, model)
        return
    trainer = Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        max_steps=module.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[MeasureSteps(steps, measure, checkpoints, every)],
    )
    resumed = None if checkpoints is None else checkpoints.before(min(steps))
    trainer.fit(module, ckpt_path=resumed, weights_only=True)
    if checkpoints is not None:
        checkpoints.remove()
