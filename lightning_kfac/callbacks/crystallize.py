"""CrystallizationStudy: carries calibration text to the residual spectra, and crystallized models to the evaluation."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_kfac.attention.collect import ResidualCapture
from lightning_kfac.attention.comparison import BASELINE, FULL, TOP1, compare, lowrank
from lightning_kfac.attention.config import CrystallizeConfig
from lightning_kfac.attention.crystallized import Crystallization, crystallize
from lightning_kfac.attention.held_out import row_losses
from lightning_kfac.attention.interface import attention_shapes
from lightning_kfac.attention.report import publish
from lightning_kfac.attention.spectra import ResidualSpectra, save_spectra
from lightning_kfac.attention.study import Study
from lightning_kfac.batch import TokenBatch
from lightning_kfac.data.datamodule import HELDOUT, TextData
from lightning_kfac.errors import InputError
from lightning_kfac.progress import track_count

RESIDUALS, STUDY = "residuals", "crystallization.json"


class CrystallizationStudy(Callback):
    """Collects residual spectra during ``fit``; then measures the model with crystallized attention in every mode.

    Each mode goes through the validation loop like an edited model (stages ``full``, ``lowrank R``, ``top1``). Top-1
    in one layer at a time, and in one head of the chosen layers at a time, is measured on the held-out text only.

    Args:
        config: Layers and ranks.

    Attributes:
        spectra: On every rank, after the last batch.
        study: Everything that was measured, on every rank, after ``fit``.

    Example:
        >>> import tempfile, lightning
        >>> from lightning_kfac.data.datamodule import TextData
        >>> from lightning_kfac.modules import CausalLM
        >>> study = CrystallizationStudy(CrystallizeConfig(layers=[5], ranks=[4]))
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, callbacks=[study], default_root_dir=tempfile.mkdtemp(), accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> text = TextData(max_tokens=500, seq_len=100, heldout="embedded", heldout_tokens=300, tokenizer="demo")
        >>> trainer.fit(CausalLM("demo"), text)
        >>> study.study.comparison.costs["top1"].change.value > 0
        True
    """

    def __init__(self, config: CrystallizeConfig):
        self.config = config
        self.spectra: ResidualSpectra | None = None
        self.study: Study | None = None
        self._capture: ResidualCapture | None = None
        self._losses: dict[str, dict[int, tuple[float, int]]] = {}
        self._recited: dict[str, tuple[float, int] | None] = {}

    def check(self, trainer: Trainer, pl_module: LightningModule, data: TextData, model: nn.Module) -> None:
        """Raises ``InputError`` for what cannot be studied.

        Args:
            model: The model or, to know early, its skeleton.
        """
        if not pl_module.frozen:
            raise InputError("crystallize needs a frozen model: leave model.training out")
        if trainer.max_epochs != 1:
            raise InputError("trainer.max_epochs must be 1: set data.max_tokens to calibrate on more or less text")
        if trainer.precision == "16-mixed":
            raise InputError("trainer.precision 16-mixed scales a loss that is not there; use bf16-mixed or 32-true")
        if HELDOUT not in data.validation_names or trainer.limit_val_batches == 0:
            raise InputError("crystallize measures perplexity: set data.heldout")
        self.config.resolve(attention_shapes(model))

    # -- collection ----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer, pl_module, trainer.datamodule, pl_module.model)
        self._capture = ResidualCapture(pl_module.model, self.config.layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.__enter__()
        pl_module.engine = _ForwardOnly(self._capture)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.is_last_batch:
            self._finish(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.spectra is None:  # stopped early
            self._finish(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._capture is not None:
            self._capture.__exit__()

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.__exit__()
        data = trainer.datamodule
        self.spectra = self._capture.spectra(
            lambda total: trainer.strategy.reduce(total, reduce_op="sum"),
            model=pl_module.model_name,
            corpus=data.corpus.label,
            seq_len=data.seq_len,
            tokenizer=data.tokenizer_name,
            world_size=trainer.world_size,
        )
        if trainer.is_global_zero:
            save_spectra(self.spectra, Path(trainer.default_root_dir) / RESIDUALS)

    # -- study ---------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shapes = attention_shapes(pl_module.model)
        layers, ranks = self.config.resolve(shapes)
        if not pl_module.results:  # the fit was cut short: no baseline yet
            trainer.fit_loop.epoch_loop.val_loop.run()
        self._recited[BASELINE] = _recited(pl_module.results)
        self._losses[BASELINE] = self._held_out(trainer, pl_module)
        # From the mildest to the harshest, so that the report's examples are those of Top-1.
        modes = {FULL: Crystallization(FULL)}
        modes |= {lowrank(rank): Crystallization("lowrank", rank) for rank in reversed(ranks)}
        for name, setting in (modes | {TOP1: Crystallization(TOP1)}).items():
            pl_module.stage = name
            with crystallize(pl_module.model, dict.fromkeys(layers, setting), self.spectra):
                trainer.fit_loop.epoch_loop.val_loop.run()
                self._recited[name] = _recited(pl_module.results)
                self._losses[name] = self._held_out(trainer, pl_module)
        apart = {f"layer {layer}": {layer: Crystallization()} for layer in shapes}
        for layer in layers:
            heads = range(shapes[layer][0])
            apart |= {f"layer {layer} head {head}": {layer: Crystallization(heads=[head])} for head in heads}
        with track_count("Top-1 in one layer or head", "evaluations", total=len(apart)) as advance_to:
            for done, (name, settings) in enumerate(apart.items(), start=1):
                with crystallize(pl_module.model, settings):
                    self._losses[name] = self._held_out(trainer, pl_module)
                advance_to(done)
        self._conclude(trainer, ranks)

    def _held_out(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, tuple[float, int]]:
        """Loss and number of targets of every held-out row, on every rank."""
        data = trainer.datamodule
        loader = data.val_dataloader()[data.validation_names.index(HELDOUT)]
        batches = (TokenBatch.from_dict(batch).to(pl_module.device) for batch in loader)
        with trainer.precision_plugin.forward_context():
            rows = row_losses(pl_module.model, batches)
        if dist.is_initialized():
            parts = [None] * trainer.world_size
            dist.all_gather_object(parts, rows)
            rows = {index: row for part in parts for index, row in part.items()}
        return rows

    def _conclude(self, trainer: Trainer, ranks: list[int]) -> None:
        rows = sorted(self._losses[BASELINE])
        losses = {name: np.array([found[row][0] for row in rows]) for name, found in self._losses.items()}
        counts = np.array([self._losses[BASELINE][row][1] for row in rows])
        self.study = Study(compare(losses, counts, ranks), self.spectra, self._recited)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / STUDY
            path.write_text(json.dumps(self.study.to_dict(), indent=2), "utf-8")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            publish(self.study, trainer.logger)


def _recited(results: dict) -> tuple[float, int] | None:
    """Strict accuracy and number of sequences of the memorized set."""
    return (results["strict_acc"], results["n_sequences"]) if "strict_acc" in results else None


class _ForwardOnly:
    """A collection's engine without a backward: Lightning gets a loss that depends on nothing."""

    def __init__(self, capture: ResidualCapture):
        self.capture = capture

    def run(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """Runs a batch; returns what Lightning differentiates, and the summed loss."""
        loss = self.capture.run(tokens)
        return torch.zeros_like(loss, requires_grad=True), loss
