"""CurvatureCollector: carries batches to the capture and writes the factors.

The work is a list of passes, one a training epoch: over the corpus and over each domain, for as many layers
as memory takes at once; then, if asked for, the same again for moments in the bases of the factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from lightning_kfac.callbacks.collection.collected import Collected, on_host
from lightning_kfac.callbacks.collection.passes import Pass, all_passes, data_name
from lightning_kfac.callbacks.collection.provenance import check_settings, collection_metadata, domain_metadata
from lightning_kfac.callbacks.collection.state import CollectionState
from lightning_kfac.callbacks.collection.state_writer import SlimCheckpointIO, StateWriter
from lightning_kfac.callbacks.collection.watch import SnapshotWatch
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.memory import MemoryPlan, plan_memory
from lightning_kfac.collection.sharded_sums import sharded_sums
from lightning_kfac.collection.sums import MomentSums
from lightning_kfac.console import progress_console, say
from lightning_kfac.data.names import CORPUS
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.strategies import ShardedStrategy
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import FOLDER as BASES
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import METADATA
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.targets import Blocks, resolve_targets
from lightning_kfac.modules.text_data import TextData

# How often the sums are looked at: a look waits for the device.
BATCHES_TO_CHECK = 8
# What Lightning needs of its checkpoint to go on with a collection.
KEPT = {"epoch", "global_step", "pytorch-lightning_version", "loops", "optimizer_states", "lr_schedulers"}


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
        save_minutes: How often the state is written from which an interrupted collection goes on. Each takes as
            much disk as the sums take memory.
        shard_factors: Spread the accumulators over ranks: each keeps those of its own layers, and every batch is
            added up over ranks. By default only where the weights are spread too (strategy ``fsdp``).

    Attributes:
        collected: Factors and moments, after the last batch.
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
        save_minutes: float = 5.0,
        shard_factors: bool | None = None,
    ):
        if not save_minutes >= 0:
            raise InputError(f"save_minutes is {save_minutes}; it must not be negative")
        if stop_overlap is not None and watch_rho is None:
            raise InputError("stop_overlap needs watch_rho, the rho of the edit to come")
        self.watch = None if watch_rho is None else SnapshotWatch(watch_rho, stop_overlap)
        self.blocks, self.projections, self.modules = blocks, projections, modules
        self.max_memory_gb, self.layers_per_pass = max_memory_gb, layers_per_pass
        self.moments, self.reuse, self.save_minutes = moments, reuse, save_minutes
        self.shard_factors = shard_factors
        self.collected = Collected(Path(), writes=False)
        self.metadata: dict = {}
        self.plan: MemoryPlan | None = None
        self.writer: StateWriter | None = None
        self._resumed: CollectionState | None = None
        self._passes: list[Pass] = []
        self._texts: list[str] = []
        self._domains: list[str] = []
        self._rows: dict[str, str] = {}
        self.keep_state = False
        self._batch_tokens = 0
        self._layers: dict[str, nn.Module] = {}
        self._capture: CurvatureCapture | None = None

    @property
    def factors(self) -> dict[str, KroneckerFactors]:
        """Factors of the corpus by dotted layer name."""
        return self.collected.factors

    @property
    def domain_factors(self) -> dict[str, dict[str, KroneckerFactors]]:
        """The same of each domain, by its name."""
        return self.collected.domain_factors

    @property
    def owners(self) -> dict[str, int] | None:
        """The one rank that has the factors of each layer; None where every rank has all."""
        return self.collected.owners

    @property
    def moments_of(self) -> dict[str, dict[str, Tensor]]:
        """Measured curvature by text: ``corpus`` or a domain."""
        return self.collected.moments

    @property
    def bases(self) -> BasisCache:
        """Eigenbases of ``factors``."""
        return self.collected.bases

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The tracked layers by dotted name; raises ``InputError`` for what does not exist."""
        return resolve_targets(model, self.blocks, self.projections, self.modules)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ``InputError`` for settings under which the factors would be wrong."""
        check_settings(trainer, pl_module)
        if self._sharded(trainer) and (self.moments or self.watch):
            raise InputError(
                f"collect.{'moments' if self.moments else 'watch_rho'} needs all factors on every rank: leave it out, "
                "or leave --trainer.strategy fsdp and --collect.shard_factors out"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(trainer, pl_module)
            trainer.strategy.checkpoint_io = SlimCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = self.targets(pl_module.model)
        data = trainer.datamodule
        self.metadata = collection_metadata(trainer, pl_module, self._layers)
        self._domains = list(getattr(data, "domains", {}))
        known = isinstance(data, TextData)
        self._rows = {name: data.rows_identity(name) for name in [CORPUS, *self._domains]} if known else {}
        root = Path(trainer.default_root_dir)
        self.collected = Collected(root, writes=trainer.is_global_zero)
        self.writer = StateWriter(root, self.save_minutes)
        self.plan, self._passes = None, []
        current_ranks().agree(self._resumed and self._resumed.position, f"{root}: the state of an interrupted run")
        if self._resumed is not None:
            self._resume(trainer, pl_module)
        if trainer.is_global_zero:
            self.writer.clear(trainer.ckpt_path if self._resumed is not None else None)
        if self._resumed is not None:
            return
        if self.reuse:
            found = self.collected.reuse(self.metadata, list(self._layers))
            current_ranks().agree(found is not None, f"{self.collected.folder(CORPUS)}: whether its factors fit")
            if found is not None:
                self.metadata["n_tokens"] = found["n_tokens"]
                say(f"{self.collected.folder(CORPUS)}: these factors are there already, they are not collected again")
            trainer.strategy.barrier()  # rank 0 puts the folder aside next
        self._texts = [*([] if self.factors else [CORPUS]), *self._domains]
        if not self._texts and not self.moments:
            raise InputError(
                f"{root / 'factors'} holds these factors already, and there is nothing else to collect: edit with "
                "them, or leave collect.reuse out"
            )
        if isinstance(data, TextData):
            data.text_in_turn = data_name([*self._texts, CORPUS][0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collected.bring_back()
        if self.factors:
            self._share_bases(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        if self.plan is None:
            self._make_plan(trainer, pl_module, *batch.input_ids.shape)
        if self._capture is None:
            self._capture = self._open_capture(self._passes[trainer.current_epoch])
            if self._resumed is not None:
                if self._resumed.max_memory_gb != self.max_memory_gb:  # it may have died of too little
                    self._cut_anew(trainer, pl_module, *batch.input_ids.shape)
                self._resumed.load_sums(self._capture, Path(trainer.ckpt_path).parent, trainer)
                self._resumed = None
            self._capture.__enter__()
            pl_module.engine = CurvatureEngine(
                pl_module.model, self._capture, pl_module.fisher_loss, self.plan.rows_at_once, self.plan.head_chunk
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx % BATCHES_TO_CHECK == 0 or trainer.is_last_batch:
            self._capture.check_finite(pl_module.batch_loss, f"batch {batch_idx}")
        n_tokens = next(iter(self._capture.counts.values()))
        pl_module.log("collect/n_tokens_on_rank_0", n_tokens.float(), reduce_fx="max")
        if self.watch is not None:
            draws, tokens = pl_module.fisher_loss.mc_samples, self._batch_tokens * trainer.world_size
            enough = self.watch.look(trainer, self._capture, draws, tokens, self.metadata)
            trainer.should_stop |= trainer.strategy.broadcast(enough)  # solvers differ in the last bit
        # Before the evaluation, so that it can fail without losing the factors.
        if trainer.is_last_batch or trainer.should_stop:
            self._finish_pass(trainer, pl_module)
        else:
            self._write_state(trainer, batch_idx)

    def _write_state(self, trainer: Trainer, batch_idx: int) -> None:
        next_to_last = batch_idx == trainer.num_training_batches - 2
        asked = next_to_last or batch_idx % BATCHES_TO_CHECK == 0 or not self.save_minutes
        # After the last of trainer.max_steps a run that goes on would find nothing to do.
        asked = asked and trainer.global_step != trainer.max_steps
        if asked and _can_go_on(trainer) and self.writer.due(trainer, next_to_last):
            self.writer.write(trainer, self._capture.state())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning stops between two batches, all ranks between the same ones.
        if isinstance(exception, SIGTERMException) and self._capture is not None and _can_go_on(trainer):
            self.writer.write(trainer, self._capture.state())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is not None:  # stopped early
            self._finish_pass(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self.keep_state:
            self.writer.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    # -- going on after a stop ---------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the state until the model is there."""
        self._resumed = CollectionState.from_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Leaves this collection's state and the loops' progress: weights do not change."""
        if self._capture is None:
            return
        state = CollectionState(
            identity=self._identity(self._sharded(trainer)),
            world_size=trainer.world_size,
            n_tokens=self.metadata.get("n_tokens"),
            plan=self.plan,
            passes=self._passes,
            number=trainer.current_epoch,
            batch_tokens=self._batch_tokens,
            leaders=self._capture.leaders,
            position=trainer.train_dataloader.state_dict(),
            snapshots=self.watch and self.watch.snapshots.state(),
            max_memory_gb=self.max_memory_gb,
        )
        for key in checkpoint.keys() - KEPT:  # whatever else a user's own classes would keep
            del checkpoint[key]
        checkpoint |= {"callbacks": {self.state_key: asdict(state)}, "state_dict": {}}

    def _identity(self, sharded: bool) -> dict[str, Any]:
        watch_rho = self.watch and self.watch.snapshots.rho
        options = {"layers": list(self._layers), "moments": self.moments, "watch_rho": watch_rho}
        options["shard_factors"] = sharded
        known = {key: value for key, value in self.metadata.items() if key not in ("world_size", "n_tokens")}
        return known | options | {"rows": self._rows}

    def _resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up passes, plan and results of the interrupted collection."""
        state, data, root = self._resumed, trainer.datamodule, Path(trainer.default_root_dir)
        state.check(self._identity(self._sharded(trainer)), root)
        if state.n_tokens is not None:
            self.metadata["n_tokens"] = state.n_tokens
        if state.world_size != trainer.world_size and (state.plan.owners or not isinstance(data, TextData)):
            raise InputError(f"{root}: the interrupted collection can go on with {state.world_size} ranks only")
        self.plan, self._batch_tokens, self._passes = state.plan, state.batch_tokens, state.passes
        self.collected.owners = state.plan.owners
        for number, work in enumerate(self._passes[: state.number]):
            self.collected.load_part(work, self.writer.part(number))
        if CORPUS not in {work.text for work in self._passes if not work.moments}:
            self.collected.reuse(self.metadata, list(self._layers))
        if self.watch is not None:
            self.watch.load_state(state.snapshots, root)
        if isinstance(data, TextData):
            data.text_in_turn, data.resume_at = self._passes[state.number].data_name, state.position
        self._set_epochs(trainer, pl_module)
        of = "" if len(self._passes) == 1 else f" of pass {state.number + 1}"
        say(f"going on after batch {state.position['batches']:,}{of}, where this run was interrupted")

    # -- parts -------------------------------------------------------------------------------------------

    def _open_capture(self, work: Pass) -> CurvatureCapture:
        layers = {name: self._layers[name] for name in work.layers}
        if self.owners is not None:
            return CurvatureCapture(layers, sharded_sums(current_ranks(), self.owners), ranks=current_ranks())
        if not work.moments:
            return CurvatureCapture(layers)

        device = next(iter(layers.values())).weight.device
        self.bases.prepare(self.factors, layers, current_ranks(), device=device)

        def sums(name: str, layer: nn.Module) -> MomentSums:
            return MomentSums(layer, *self.bases.of(self.factors, name, layer.weight.device), self.moments)

        return CurvatureCapture(layers, sums)

    def _cut_anew(self, trainer: Trainer, pl_module: LightningModule, rows: int, seq_len: int) -> None:
        """Batches are cut for the memory that there is now; the passes stay."""
        plan = self._plan(trainer, pl_module, rows, seq_len)
        self.plan = replace(self.plan, rows_at_once=plan.rows_at_once, head_chunk=plan.head_chunk)

    def _plan(self, trainer: Trainer, pl_module: LightningModule, rows: int, seq_len: int) -> MemoryPlan:
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
        return trainer.strategy.broadcast(plan)

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule, rows: int, seq_len: int) -> None:
        self.plan = self._plan(trainer, pl_module, rows, seq_len)
        self._batch_tokens = trainer.strategy.broadcast(rows * seq_len)
        self.collected.owners = self.plan.owners
        self._passes = all_passes(self.plan.passes, self._texts, self._domains, self.moments is not None)
        if self.watch is not None and len(self._passes) > 1:
            raise InputError("watch_rho needs one pass: choose fewer layers, no domain and no moments, or leave it out")
        if trainer.is_global_zero:
            progress_console.print(f"plan: {self.plan}")
        self._set_epochs(trainer, pl_module)

    def _set_epochs(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One epoch a pass; the unedited model is evaluated once, after the last."""
        trainer.fit_loop.max_epochs = len(self._passes)
        trainer.check_val_every_n_epoch = len(self._passes) + pl_module.skip_baseline  # beyond the last: never
        if len({work.text for work in self._passes}) > 1 or self._resumed is not None:
            trainer.reload_dataloaders_every_n_epochs = 1

    def _finish_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.check_finite(pl_module.batch_loss, "the last batch")
        self._capture.reduce(_sum_over_ranks(trainer))
        work, number = self._passes[trainer.current_epoch], trainer.current_epoch + 1
        draws, found = pl_module.fisher_loss.mc_samples, self.collected.of(work)
        if work.moments:
            counts = self._capture.n_tokens()
            found.update({name: sums.total / (draws * counts[name]) for name, sums in self._capture.sums.items()})
        else:
            found.update(on_host(self._capture.factors(draws)))
        self._release(pl_module)
        if len(found) == len(self._layers):
            self._save(trainer, work)
        else:
            self.collected.save_part(work, self.writer.part(trainer.current_epoch))
        if number < len(self._passes) and isinstance(trainer.datamodule, TextData):
            trainer.datamodule.text_in_turn = self._passes[number].data_name

    def _save(self, trainer: Trainer, work: Pass) -> None:
        """Writes what all passes over one text have given."""
        if work.moments:
            self.collected.save(work, self.moments, {})
            return
        n_tokens = next(iter(self.collected.of(work).values())).n_tokens
        if general := work.text == CORPUS:
            self.metadata["n_tokens"] = n_tokens
        own = {} if general else domain_metadata(trainer.datamodule, work.text)
        self.collected.save(work, None, self.metadata | own | {"n_tokens": n_tokens})
        if general:
            self._share_bases(trainer)
        if trainer.logger is not None:
            name = "n_tokens" if general else f"n_tokens_{work.text}"
            trainer.logger.log_metrics({f"collect/{name}": n_tokens}, trainer.global_step)

    def _share_bases(self, trainer: Trainer) -> None:
        """Every rank that sees the folder of the factors keeps eigenbases there, for all to read."""
        trainer.strategy.barrier("factors")
        folder = self.collected.folder(CORPUS)
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


def _can_go_on(trainer: Trainer) -> bool:
    """Whether the loader of the text can be stopped and taken up again."""
    return hasattr(trainer.train_dataloader, "load_state_dict")


def _sum_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")


def find_collector(trainer: Trainer) -> CurvatureCollector:
    """The trainer's collector, which an edit needs before it in the list of callbacks."""
    for callback in trainer.callbacks:
        if isinstance(callback, CurvatureCollector):
            return callback
    raise InputError("EditCallback needs a CurvatureCollector before it in trainer.callbacks")
