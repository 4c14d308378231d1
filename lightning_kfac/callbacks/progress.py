"""Lightning's loops on the package's own progress display."""

from contextlib import ExitStack

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_kfac.console import track_count


class RunProgress(ProgressBar):
    """Tokens a second and ETA while collecting or training, batches while evaluating or mining."""

    def __init__(self):
        super().__init__()
        self._display = ExitStack()
        self._advance_to = None
        self._done = 0
        self._shown: tuple[str, int] | None = None

    def disable(self) -> None:
        """Lightning calls this on ranks that should stay silent; the display already knows its rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        if self._shown == ("train", trainer.current_epoch):
            return
        verb = "collect" if pl_module.frozen else "train"
        per_batch = trainer.datamodule.batch_size * trainer.datamodule.seq_len * trainer.world_size
        total = self.total_train_batches * per_batch if self.total_train_batches != float("inf") else None
        self._per_batch = per_batch
        self._start(verb, "tokens", total, batch_idx * per_batch)  # an interrupted run begins in the middle
        self._shown = "train", trainer.current_epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._advance(self._per_batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(f"evaluate {pl_module.stage} model", "batches", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._advance(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("look for recited windows", "windows", trainer.datamodule.windows_left)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._advance(outputs.windows * trainer.world_size)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._display.close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._display.close()

    def _start(self, description: str, unit: str, total: int | None, done: int = 0) -> None:
        self._display.close()
        self._done, self._shown = done, None
        self._advance_to = self._display.enter_context(track_count(description, unit, total, done))

    def _advance(self, amount: int) -> None:
        self._done += amount
        self._advance_to(self._done)
