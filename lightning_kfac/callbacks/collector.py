"""CurvatureCollector: carries batches to the capture and writes the factors."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_kfac.capture import CurvatureCapture
from lightning_kfac.data.datamodule import TextData
from lightning_kfac.engine import CurvatureEngine
from lightning_kfac.errors import InputError
from lightning_kfac.factors import KroneckerFactors, save_factors
from lightning_kfac.fingerprint import weights_fingerprint
from lightning_kfac.math.selection import check_rho
from lightning_kfac.plan import MemoryPlan, plan_memory
from lightning_kfac.progress import progress_console
from lightning_kfac.snapshots import Snapshots
from lightning_kfac.targets import Blocks, resolve_targets

# How often the sums are looked at: a look waits for the device.
BATCHES_TO_CHECK = 8


class CurvatureCollector(Callback):
    """Accumulates A and G of the chosen layers during ``fit``, sums them over ranks and saves them.

    Args:
        blocks: Transformer blocks by index, negative from the end, or ``all``.
        projections: Any of gate, up, down, q, k, v, o.
        modules: Instead of both: regular expressions on dotted names.
        max_memory_gb: Cap on memory beside the weights, in GB; by default what is free. The text is read
            in several passes where the factors of all layers do not fit.
        layers_per_pass: Fixes the number of projections a pass.
        watch_rho: At every doubling of the tokens, save a snapshot of the factors and compare what an
            edit at this rho would keep with the snapshot before. (Each needs the eigenbases of all layers.)
        stop_overlap: End the collection when no layer's overlap is below this, in [0, 1].

    Attributes:
        factors: By dotted layer name, on every rank, after the last batch.
        metadata: What ``factors/metadata.json`` says beside the layers.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> collector = CurvatureCollector(blocks=[-1], projections=["gate", "up"])
        >>> list(collector.targets(load_model("demo")))
        ['model.layers.5.mlp.gate_proj', 'model.layers.5.mlp.up_proj']
    """

    def __init__(
        self,
        blocks: Blocks = "all",
        projections: Sequence[str] = ("gate", "up", "down"),
        modules: Sequence[str] | None = None,
        max_memory_gb: float | None = None,
        layers_per_pass: int | None = None,
        watch_rho: float | None = None,
        stop_overlap: float | None = None,
    ):
        if watch_rho is not None:
            check_rho(watch_rho)
        if stop_overlap is not None and (watch_rho is None or not 0 <= stop_overlap <= 1):
            raise InputError("stop_overlap must lie in [0, 1] and needs watch_rho, the rho of the edit to come")
        self.snapshots = None if watch_rho is None else Snapshots(watch_rho)
        self.stop_overlap = stop_overlap
        self.blocks, self.projections, self.modules = blocks, projections, modules
        self.max_memory_gb, self.layers_per_pass = max_memory_gb, layers_per_pass
        self.factors: dict[str, KroneckerFactors] = {}
        self.metadata: dict = {}
        self.plan: MemoryPlan | None = None
        self._batch_tokens = 0
        self._layers: dict[str, nn.Module] = {}
        self._capture: CurvatureCapture | None = None

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The tracked layers by dotted name; raises ``InputError`` for what does not exist."""
        return resolve_targets(model, self.blocks, self.projections, self.modules)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ``InputError`` for settings under which the factors would be wrong."""
        if not pl_module.frozen:
            raise InputError("CurvatureCollector needs a frozen model: leave model.training out")
        if trainer.accumulate_grad_batches != 1:
            raise InputError("trainer.accumulate_grad_batches must be 1: Lightning would divide the loss by it")
        if trainer.max_epochs != 1:
            raise InputError("trainer.max_epochs must be 1: set data.max_tokens to collect on more or less text")
        plugin = trainer.precision_plugin
        if plugin.precision in ("16-true", "16-mixed") and not (
            isinstance(plugin, MixedPrecision) and plugin.scaler is None
        ):
            raise InputError(
                f"trainer.precision {plugin.precision}: float16 gradients overflow, and scaling the loss scales G by "
                "its square; use bf16-mixed, bf16-true or 32-true"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = self.targets(pl_module.model)
        data, precision = trainer.datamodule, str(next(pl_module.model.parameters()).dtype).removeprefix("torch.")
        if isinstance(trainer.precision_plugin, MixedPrecision):
            precision += f" ({trainer.precision_plugin.precision})"
        self.metadata = {
            "model": pl_module.model_name or "random weights",
            "fingerprint": weights_fingerprint(pl_module.model, self._layers),
            "tokenizer": getattr(data, "tokenizer_name", None),
            "corpus": data.corpus.label if isinstance(data, TextData) else None,
            "labels": pl_module.labels,
            "mc_samples": pl_module.fisher_loss.mc_samples,
            "precision": precision,
            "seed": pl_module.seed,
            "world_size": trainer.world_size,
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        if self.plan is None:
            self._make_plan(trainer, pl_module, *batch.input_ids.shape)
        if self._capture is None:
            names = self.plan.passes[trainer.current_epoch]
            self._capture = CurvatureCapture({name: self._layers[name] for name in names})
            self._capture.__enter__()
            pl_module.engine = CurvatureEngine(
                pl_module.model, self._capture, pl_module.fisher_loss, self.plan.rows_at_once, self.plan.head_chunk
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx % BATCHES_TO_CHECK == 0 or trainer.is_last_batch:
            self._capture.check_finite(pl_module.batch_loss, f"batch {batch_idx}")
        n_tokens = next(iter(self._capture.counts.values()))
        pl_module.log("collect/n_tokens_on_rank_0", n_tokens.float(), reduce_fx="max")
        if self.snapshots is not None:
            self._watch(trainer, pl_module)
        # Before the evaluation, so that it can fail without losing the factors.
        if self._capture is not None and trainer.is_last_batch:
            self._finish_pass(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is not None:  # stopped early
            self._finish_pass(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule, rows: int, seq_len: int) -> None:
        plan = plan_memory(
            pl_module.model,
            self._layers,
            pl_module.fisher_loss,
            rows,
            seq_len,
            self.max_memory_gb,
            self.layers_per_pass,
            processes=trainer.num_devices,
        )
        # Ranks may see different free memory and other shapes, and must do the same all the same.
        self.plan, self._batch_tokens = trainer.strategy.broadcast((plan, rows * seq_len))
        if self.snapshots is not None and len(self.plan.passes) > 1:
            raise InputError("watch_rho needs all layers in one pass: choose fewer, or leave it out")
        if trainer.is_global_zero:
            progress_console.print(f"plan: {self.plan}")
        # One epoch a pass; the unedited model is evaluated once, after the last.
        trainer.fit_loop.max_epochs = trainer.check_val_every_n_epoch = len(self.plan.passes)

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a snapshot where the tokens have doubled, and ends the collection where nothing moves any more."""
        if not self.snapshots.due(self._batch_tokens * trainer.world_size):
            return
        factors = self._capture.snapshot(_sum_over_ranks(trainer), pl_module.fisher_loss.mc_samples)
        overlaps = self.snapshots.compare(factors)
        n_tokens = next(iter(factors.values())).n_tokens
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "snapshots" / str(n_tokens)
            save_factors(factors, path, self.metadata | {"n_tokens": n_tokens})
            said = f"kept sets overlap {min(overlaps.values()):.3f} or more with the last" if overlaps else "the first"
            progress_console.print(f"snapshot at {n_tokens:,} tokens: {said}")
        if overlaps and trainer.logger is not None:
            figures = {f"overlap/{name}": value for name, value in overlaps.items()}
            trainer.logger.log_metrics(figures | {"collect/n_tokens": n_tokens}, trainer.global_step)
        if overlaps and self.stop_overlap is not None and min(overlaps.values()) >= self.stop_overlap:
            trainer.should_stop = True
            self._finish_pass(trainer, pl_module)

    def _finish_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.check_finite(pl_module.batch_loss, "the last batch")
        self._capture.reduce(_sum_over_ranks(trainer))
        self.factors |= self._capture.factors(pl_module.fisher_loss.mc_samples)
        self._release(pl_module)
        if len(self.factors) < len(self._layers):
            return
        self.metadata["n_tokens"] = next(iter(self.factors.values())).n_tokens
        if trainer.is_global_zero:
            save_factors(self.factors, Path(trainer.default_root_dir) / "factors", self.metadata)
        if trainer.logger is not None:
            trainer.logger.log_metrics({"collect/n_tokens": self.metadata["n_tokens"]}, trainer.global_step)

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is not None:
            self._capture.__exit__()
            self._capture = pl_module.engine = None


def _sum_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")


def find_collector(trainer: Trainer) -> CurvatureCollector:
    """The trainer's collector, which an edit needs before it in the list of callbacks."""
    for callback in trainer.callbacks:
        if isinstance(callback, CurvatureCollector):
            return callback
    raise InputError("EditCallback needs a CurvatureCollector before it in trainer.callbacks")
