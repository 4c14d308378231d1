"""Lightning's loops on the package's own progress display."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.console import track_count
from lightning_kfac.mining.search import Looked
from lightning_kfac.modules.text_data import text_data
from lightning_kfac.reporting.labels import stage_label


class RunProgress(ProgressBar):
    """Tokens a second and ETA while collecting or training, batches while evaluating or mining."""

    def __init__(self) -> None:
        super().__init__()
        self._display = ExitStack()
        self._advance_to: Callable[[int], None] = _nowhere
        self._done = 0
        self._per_batch = 0
        self._shown: tuple[str, int] | None = None

    @override
    def disable(self) -> None:
        """Lightning calls this on ranks that should stay silent; the display already knows its rank."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._shown == ("train", trainer.current_epoch):
            return
        verb = "collect" if causal_lm(pl_module).frozen else "train"
        data = text_data(trainer)
        per_batch = data.batch_size * data.seq_len * trainer.world_size
        n_batches = self.total_train_batches
        total = int(n_batches) * per_batch if n_batches != float("inf") else None
        self._per_batch = per_batch
        self._start(verb, "tokens", total, batch_idx * per_batch)  # an interrupted run begins in the middle
        self._shown = "train", trainer.current_epoch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._advance(self._per_batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = stage_label(causal_lm(pl_module).stage)
        self._start(f"evaluate {stage} model", "batches", int(sum(trainer.num_val_batches)))

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("look for recited windows", "windows", text_data(trainer).search.windows_left)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Looked,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(outputs.searched.windows * trainer.world_size)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(type(exception)):  # what was shown ends, and not as done
            self._display.__exit__(type(exception), exception, exception.__traceback__)

    def _start(self, description: str, unit: str, total: int | None, done: int = 0) -> None:
        self._display.close()
        self._done = done
        self._shown = None
        self._advance_to = self._display.enter_context(track_count(description, unit, total, done))

    def _advance(self, amount: int) -> None:
        self._done += amount
        self._advance_to(self._done)


def _nowhere(done: int) -> None:
    """Before anything is shown."""
