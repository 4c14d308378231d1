"""CurvatureCollector: carries batches to the capture and writes the factors.

The work is a list of passes, one a training epoch: over the corpus and over each domain, for as many layers
as memory takes at once; then, if asked for, the same again for moments in the bases of the factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_kfac.bases import FOLDER as BASES
from lightning_kfac.bases import BasisCache
from lightning_kfac.capture import CurvatureCapture, MomentSums
from lightning_kfac.data.datamodule import CORPUS, TextData, domain_text
from lightning_kfac.engine import CurvatureEngine
from lightning_kfac.errors import InputError
from lightning_kfac.factors import METADATA, KroneckerFactors, load_factors, save_factors
from lightning_kfac.fingerprint import weights_fingerprint
from lightning_kfac.math.selection import check_rho
from lightning_kfac.moments import save_moments
from lightning_kfac.plan import MemoryPlan, plan_memory
from lightning_kfac.progress import progress_console
from lightning_kfac.ranks import current_ranks
from lightning_kfac.run_folder import PREVIOUS
from lightning_kfac.sharded_factors import save_sharded, sharded_sums
from lightning_kfac.snapshots import Snapshots
from lightning_kfac.strategies import ShardedStrategy
from lightning_kfac.targets import Blocks, resolve_targets

# How often the sums are looked at: a look waits for the device.
BATCHES_TO_CHECK = 8


@dataclass(frozen=True)
class Pass:
    """One reading of one text.

    Attributes:
        text: ``corpus`` or the name of a domain.
        layers: Those whose sums fit into memory at once.
        moments: Measure in the bases of the factors instead of summing factors.
    """

    text: str
    layers: tuple[str, ...]
    moments: bool


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
        moments: Also measure the curvature in the bases of the factors, in a second pass (EK-FAC: for the
            formulas ``corrected`` and ``corrected_modified``): per ``token`` or per ``sequence``.
        reuse: Do not collect the corpus again where the run folder holds its factors already, of the same
            weights, layers, text and settings. (Domains are always collected.)
        shard_factors: Spread the accumulators over ranks: each keeps those of its own layers, and every batch is
            added up over ranks. By default only where the weights are spread too (strategy ``fsdp``).

    Attributes:
        factors: By dotted layer name, on every rank, after the last batch.
        domain_factors: The same of each domain, by its name.
        moments_of: Measured curvature by text: ``corpus`` or a domain.
        owners: The one rank that has the factors of each layer; None where every rank has all.
        bases: Eigenbases, kept beside the factors by every rank that sees them there.
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
        moments: Literal["token", "sequence"] | None = None,
        reuse: bool = False,
        shard_factors: bool | None = None,
    ):
        if watch_rho is not None:
            check_rho(watch_rho)
        if stop_overlap is not None and (watch_rho is None or not 0 <= stop_overlap <= 1):
            raise InputError("stop_overlap must lie in [0, 1] and needs watch_rho, the rho of the edit to come")
        self.snapshots = None if watch_rho is None else Snapshots(watch_rho)
        self.stop_overlap = stop_overlap
        self.blocks, self.projections, self.modules = blocks, projections, modules
        self.max_memory_gb, self.layers_per_pass = max_memory_gb, layers_per_pass
        self.moments, self.reuse, self.shard_factors = moments, reuse, shard_factors
        self.factors: dict[str, KroneckerFactors] = {}
        self.domain_factors: dict[str, dict[str, KroneckerFactors]] = {}
        self.moments_of: dict[str, dict[str, Tensor]] = {}
        self.bases = BasisCache()
        self.metadata: dict = {}
        self.plan: MemoryPlan | None = None
        self.owners: dict[str, int] | None = None
        self._passes: list[Pass] = []
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
        if self._sharded(trainer) and (self.moments or self.snapshots):
            raise InputError(
                f"collect.{'moments' if self.moments else 'watch_rho'} needs all factors on every rank: leave it out, "
                "or leave --trainer.strategy fsdp and --collect.shard_factors out"
            )
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
            "text": data.corpus.identity() if isinstance(data, TextData) else None,
            "max_tokens": getattr(data, "max_tokens", None),
            "seq_len": getattr(data, "seq_len", None),
            "labels": pl_module.labels,
            "mc_samples": pl_module.fisher_loss.mc_samples,
            "precision": precision,
            "seed": pl_module.seed,
            "world_size": trainer.world_size,
        }
        folder = Path(trainer.default_root_dir) / "factors"
        self.bases = BasisCache(folder / BASES if trainer.is_global_zero else None)
        if self.reuse:
            self._reuse(folder, trainer)
            trainer.strategy.barrier()  # rank 0 puts the folder aside next
        self._texts = [*([] if self.factors else [CORPUS]), *getattr(data, "domains", {})]
        if not self._texts and not self.moments:
            raise InputError(
                f"{folder} holds these factors already, and there is nothing else to collect: edit with edit.py, or "
                "leave collect.reuse out"
            )
        if isinstance(data, TextData):
            data.text_in_turn = _text_name([*self._texts, CORPUS][0])

    def _reuse(self, folder: Path, trainer: Trainer) -> None:
        """Takes the factors of an earlier run of the same settings, which lie in the run folder or were put aside."""
        for place in (folder, folder.parent / PREVIOUS / folder.name):
            try:
                found = load_factors(place)
            except InputError:
                continue
            same = all(found.metadata.get(k) == v for k, v in self.metadata.items() if k != "world_size")
            if same and list(found) == list(self._layers):
                self.factors = {name: found[name] for name in found}
                self.metadata["n_tokens"] = found.metadata["n_tokens"]
                if trainer.is_global_zero:
                    progress_console.print(f"{folder}: these factors are there already, they are not collected again")
                return

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Beginning a run puts the outputs of the one before it aside, also the factors that stay in use.
        folder = Path(trainer.default_root_dir) / "factors"
        aside = folder.parent / PREVIOUS / folder.name
        if self.factors and trainer.is_global_zero and not folder.exists() and aside.exists():
            aside.rename(folder)
        if self.factors:
            self._share_bases(trainer, folder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        if self.plan is None:
            self._make_plan(trainer, pl_module, *batch.input_ids.shape)
        if self._capture is None:
            self._capture = self._open_capture(self._passes[trainer.current_epoch])
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

    def _open_capture(self, work: "Pass") -> CurvatureCapture:
        layers = {name: self._layers[name] for name in work.layers}
        if self.owners is not None:
            return CurvatureCapture(layers, sharded_sums(current_ranks(), self.owners), ranks=current_ranks())
        if not work.moments:
            return CurvatureCapture(layers)
        if work.text not in self.moments_of:
            self.moments_of[work.text] = {}

        device = next(iter(layers.values())).weight.device
        self.bases.prepare(self.factors, layers, current_ranks(), device=device)

        def sums(name: str, layer: nn.Module) -> MomentSums:
            return MomentSums(layer, *self.bases.of(self.factors, name, layer.weight.device), self.moments)

        return CurvatureCapture(layers, sums)

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
            owning_ranks=trainer.world_size if self._sharded(trainer) else None,
        )
        # Ranks may see different free memory and other shapes, and must do the same all the same.
        self.plan, self._batch_tokens = trainer.strategy.broadcast((plan, rows * seq_len))
        self.owners = self.plan.owners
        kinds = [False, True] if self.moments else [False]
        texts = {False: self._texts, True: [CORPUS, *getattr(trainer.datamodule, "domains", {})]}
        self._passes = [
            Pass(text, tuple(names), moments)
            for moments in kinds
            for text in texts[moments]
            for names in self.plan.passes
        ]
        if self.snapshots is not None and len(self._passes) > 1:
            raise InputError("watch_rho needs one pass: choose fewer layers, no domain and no moments, or leave it out")
        if trainer.is_global_zero:
            progress_console.print(f"plan: {self.plan}")
        # One epoch a pass; the unedited model is evaluated once, after the last.
        trainer.fit_loop.max_epochs = len(self._passes)
        trainer.check_val_every_n_epoch = len(self._passes) + pl_module.skip_baseline  # beyond the last: never
        if len({work.text for work in self._passes}) > 1:
            trainer.reload_dataloaders_every_n_epochs = 1

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
        work, number = self._passes[trainer.current_epoch], trainer.current_epoch + 1
        if work.moments:
            collected = self.moments_of[work.text]
            counts = self._capture.n_tokens()
            draws = pl_module.fisher_loss.mc_samples
            collected |= {name: sums.total / (draws * counts[name]) for name, sums in self._capture.sums.items()}
        else:
            collected = self.factors if work.text == CORPUS else self.domain_factors.setdefault(work.text, {})
            collected |= self._capture.factors(pl_module.fisher_loss.mc_samples)
        self._release(pl_module)
        if len(collected) == len(self._layers):
            self._save(trainer, work, collected)
        if number < len(self._passes) and isinstance(trainer.datamodule, TextData):
            trainer.datamodule.text_in_turn = _text_name(self._passes[number].text)

    def _save(self, trainer: Trainer, work: "Pass", collected: dict) -> None:
        """Writes what all passes over one text have given."""
        general = work.text == CORPUS
        root = Path(trainer.default_root_dir)
        folder = root / "factors" if general else root / "domains" / work.text
        if work.moments:
            if trainer.is_global_zero:
                save_moments(collected, folder, self.factors, self.bases, self.moments)
            return
        metadata = self.metadata
        n_tokens = next(iter(collected.values())).n_tokens
        if general:
            metadata["n_tokens"] = n_tokens
        else:
            data = trainer.datamodule
            corpus = data.domains[work.text]
            own = {"corpus": corpus.label, "text": corpus.identity(), "max_tokens": data.domain_tokens}
            metadata = metadata | own | {"n_tokens": n_tokens}
        if self.owners is not None:
            save_sharded(collected, folder, metadata, current_ranks(), self.owners)
        elif trainer.is_global_zero:
            save_factors(collected, folder, metadata)
        if general:
            self._share_bases(trainer, folder)
        if trainer.logger is not None:
            name = "n_tokens" if general else f"n_tokens_{work.text}"
            trainer.logger.log_metrics({f"collect/{name}": n_tokens}, trainer.global_step)

    def _share_bases(self, trainer: Trainer, folder: Path) -> None:
        """Every rank that sees the folder of the factors keeps eigenbases there, for all to read."""
        trainer.strategy.barrier("factors")
        if (folder / METADATA).is_file():
            self.bases.folder = folder / BASES

    def _sharded(self, trainer: Trainer) -> bool:
        """Whether each rank keeps the factors of its own layers only."""
        wanted = isinstance(trainer.strategy, ShardedStrategy) if self.shard_factors is None else self.shard_factors
        return wanted and trainer.world_size > 1

    def _release(self, pl_module: LightningModule) -> None:
        if self._capture is not None:
            self._capture.__exit__()
            self._capture = pl_module.engine = None


def _text_name(text: str) -> str:
    return CORPUS if text == CORPUS else domain_text(text)


def _sum_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")


def find_collector(trainer: Trainer) -> CurvatureCollector:
    """The trainer's collector, which an edit needs before it in the list of callbacks."""
    for callback in trainer.callbacks:
        if isinstance(callback, CurvatureCollector):
            return callback
    raise InputError("EditCallback needs a CurvatureCollector before it in trainer.callbacks")
