"""ResidualCollector: carries calibration text to the residual spectra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_kfac.attention.collect import ResidualCapture
from lightning_kfac.attention.spectra import ResidualSpectra
from lightning_kfac.attention.storage import save_spectra
from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.modules.text_data import text_data

RESIDUALS = "residuals"


class ResidualCollector(Callback):
    """Accumulates the second moments of attention residuals during ``fit`` and sums them over ranks.

    Nothing is differentiated. The spectra are saved to ``<run>/residuals``.

    Args:
        layers: By number, negative from the end.

    Attributes:
        spectra: On every rank, after the last batch.

    Example:
        >>> import tempfile, lightning
        >>> from lightning_kfac.modules.text_data import TextData
        >>> from lightning_kfac.modules import CausalLM
        >>> collector = ResidualCollector(layers=[5])
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, callbacks=[collector], default_root_dir=tempfile.mkdtemp(), accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(CausalLM("demo"), TextData(max_tokens=500, seq_len=100, tokenizer="demo"))
        >>> collector.spectra[5].effective_dimension().shape
        torch.Size([4])
    """

    def __init__(self, layers: Sequence[int]):
        self.layers = layers
        self.spectra: ResidualSpectra | None = None
        self._capture: ResidualCapture | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ``InputError`` for settings of a run that does not only run forward."""
        if not causal_lm(pl_module).frozen:
            raise InputError("crystallize needs a frozen model: leave model.training out")
        if trainer.max_epochs != 1:
            raise InputError("trainer.max_epochs must be 1: set data.max_tokens to calibrate on more or less text")
        if trainer.precision == "16-mixed":
            raise InputError("trainer.precision 16-mixed scales a loss that is not there; use bf16-mixed or 32-true")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer, pl_module)
        self._capture = ResidualCapture(causal_lm(pl_module).loaded, self.layers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        capture = self._running.__enter__()
        causal_lm(pl_module).collection = _ForwardOnly(capture)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        # Before the evaluation, which is not to be listened to.
        if trainer.is_last_batch:
            self._finish(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.spectra is None:  # stopped early
            self._finish(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._capture is not None:
            self._capture.__exit__()

    @property
    def _running(self) -> ResidualCapture:
        if self._capture is None:
            raise RuntimeError("no collection of residuals has begun: trainer.fit begins one")
        return self._capture

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        capture = self._running
        capture.__exit__()
        data = text_data(trainer)
        self.spectra = capture.spectra(
            lambda total: trainer.strategy.reduce(total, reduce_op="sum"),
            model=causal_lm(pl_module).model_name,
            corpus=data.corpus.label,
            seq_len=data.seq_len,
            tokenizer=data.tokenizer_name,
            world_size=trainer.world_size,
        )
        if trainer.is_global_zero:
            save_spectra(self.spectra, Path(trainer.default_root_dir) / RESIDUALS)


class _ForwardOnly:
    """A collection without a backward: Lightning gets a loss that depends on nothing."""

    def __init__(self, capture: ResidualCapture):
        self.capture = capture
        self.loss = torch.zeros(())

    def run(self, tokens: TokenBatch) -> Tensor:
        """Runs a batch; returns what Lightning differentiates."""
        self.loss = self.capture.run(tokens)
        return torch.zeros_like(self.loss, requires_grad=True)
