"""CurvatureCollector: has a session collect the curvature of a fit, and writes the factors.

The work is a list of passes, one a training epoch: over the corpus and over each domain, for as many layers
as memory takes at once; then, if asked for, the same again for moments in the bases of the factors.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_kfac.callbacks.collection.collected import Collected
from lightning_kfac.callbacks.collection.course import Course
from lightning_kfac.callbacks.collection.provenance import check_settings, collection_metadata
from lightning_kfac.callbacks.collection.resume import go_on, identity_of, slim, state_of
from lightning_kfac.callbacks.collection.state import CollectionState
from lightning_kfac.callbacks.collection.state_writer import SlimCheckpointIO
from lightning_kfac.callbacks.collection.task import TaskModule, task_of
from lightning_kfac.callbacks.collection.watch import SnapshotWatch
from lightning_kfac.callbacks.typed import callbacks_of
from lightning_kfac.collection.memory import MemoryPlan
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.console import progress_console, say
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.strategies import ShardedStrategy
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.choices import Blocks, Projections, block_choice, projection_choice
from lightning_kfac.models.compiled import check_compiler
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.targets import resolve_targets

# How often the sums are looked at: a look waits for the device.
BATCHES_TO_CHECK = 8


class CurvatureCollector(Callback):
    """Accumulates A and G of the chosen layers during ``fit``, sums them over ranks and saves them.

    Args:
        blocks: Transformer blocks by index, negative from the end, or ``all``.
        projections: Any of gate, up, down, q, k, v, o; of experts expert_gate, expert_up, expert_down, and shared_gate,
            shared_up, shared_down of one that every token goes through. By default gate, up, down, of them
            those that there are.
        modules: Instead of both: regular expressions on dotted names.
        max_memory_gb: Cap on memory beside the weights, in GB; by default what is free. The text is read
            in several passes where the factors of all layers do not fit.
        layers_per_pass: Fixes the number of projections a pass.
        watch_rho: At every doubling of the tokens, save a snapshot of the factors and compare what an
            edit at this rho would keep with the snapshot before. (Each needs the eigenbases of all layers.)
        stop_overlap: End the collection when no layer's overlap is below this, in [0, 1].
        moments: Also measure the curvature in the bases of the factors, in a second pass (EK-FAC: for the
            formulas ``corrected`` and ``corrected_modified``): per ``token`` or per ``sequence``.
        coupled: Also collect ||g||^2 a a^T and ||a||^2 g g^T in the same pass, which tell how inputs and gradients go
            together: for the formulas ``coupled``, ``coupled_modified`` and ``output_side``.
        compile: Run what lies between the tracked layers through ``torch.compile``, which fuses element-wise work: 1.4
            times as fast on an H200, 1.05 on a CPU, after half a minute there and minutes here before the first batch.
            Factors differ within the model's precision. Not with strategy ``fsdp``.
        reuse: Do not collect the corpus again where the run folder holds its factors already, of the same
            weights, layers, text and settings. (Domains are always collected.)
        save_minutes: How often the state is written from which an interrupted collection goes on. Each takes as
            much disk as the sums take memory.
        shard_factors: Spread the accumulators over ranks: each keeps those of its own layers, and every batch is
            added up over ranks. By default only where the weights are spread too (strategy ``fsdp``).

    Attributes:
        keep_state: Leave the state of the collection where the fit ends, for a run that goes on beyond it.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> collector = CurvatureCollector(blocks=[-1], projections=["gate", "up"])
        >>> list(collector.targets(load_model("demo")))
        ['model.layers.5.mlp.gate_proj', 'model.layers.5.mlp.up_proj']
    """

    def __init__(
        self,
        blocks: Blocks = "all",
        projections: Projections | None = None,
        modules: Sequence[str] | None = None,
        max_memory_gb: float | None = None,
        layers_per_pass: int | None = None,
        watch_rho: float | None = None,
        stop_overlap: float | None = None,
        moments: Literal["token", "sequence"] | None = None,
        coupled: bool = False,
        compile: bool = False,
        reuse: bool = False,
        save_minutes: float = 5.0,
        shard_factors: bool | None = None,
    ):
        if not save_minutes >= 0:
            raise InputError(f"save_minutes is {save_minutes}; it must not be negative")
        if stop_overlap is not None and watch_rho is None:
            raise InputError("stop_overlap needs watch_rho, the rho of the edit to come")
        self.watch = None if watch_rho is None else SnapshotWatch(watch_rho, stop_overlap)
        self.blocks = block_choice(blocks)
        self.projections = projection_choice(projections)
        self.modules = modules
        self.max_memory_gb = max_memory_gb
        self.layers_per_pass = layers_per_pass
        self.moments = moments
        self.coupled = coupled
        self.compile = compile
        self.reuse = reuse
        self.save_minutes = save_minutes
        self.shard_factors = shard_factors
        self._course: Course | None = None
        self.keep_state = False
        self._resumed: CollectionState | None = None
        self._nothing = Collected(Path(), writes=False)

    @property
    def course(self) -> Course:
        """The collection of the present fit; raises ``RuntimeError`` before it begins."""
        if self._course is None:
            raise RuntimeError("no collection has begun: trainer.fit begins one")
        return self._course

    @property
    def collected(self) -> Collected:
        """What the collection has found so far."""
        return self._nothing if self._course is None else self._course.collected

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``factors/metadata.json`` says beside the layers."""
        return {} if self._course is None else self._course.metadata

    @property
    def plan(self) -> MemoryPlan | None:
        """How the collection is cut, once that is known."""
        if self._course is None or not self._course.session.planned:
            return None
        return self._course.session.plan

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

    def targets(self, model: nn.Module) -> dict[str, Layer]:
        """The tracked layers by dotted name; raises ``InputError`` for what does not exist."""
        return resolve_targets(model, self.blocks, self.projections, self.modules)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ``InputError`` for settings under which the factors would be wrong."""
        check_settings(trainer, task_of(pl_module))
        if self.is_sharded(trainer) and (self.moments or self.watch):
            raise InputError(
                f"collect.{'moments' if self.moments else 'watch_rho'} needs all factors on every rank: leave it out, "
                "or leave trainer.strategy fsdp and collect.shard_factors out",
                "trainer.strategy",
                "collect.shard_factors",
            )
        if self.compile:
            if isinstance(trainer.strategy, ShardedStrategy):
                message = "collect.compile does not work with trainer.strategy fsdp; leave one of them out"
                raise InputError(message, "collect.compile", "trainer.strategy")
            check_compiler(trainer.strategy.root_device.type)

    def is_sharded(self, trainer: Trainer) -> bool:
        """Whether each rank keeps the factors of its own layers only."""
        wanted = isinstance(trainer.strategy, ShardedStrategy) if self.shard_factors is None else self.shard_factors
        return wanted and trainer.world_size > 1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(trainer, pl_module)
            trainer.strategy.checkpoint_io = SlimCheckpointIO()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = task_of(pl_module)
        session = CollectionSession(
            task.model,
            self.targets(task.model),
            task.objective,
            max_memory_gb=self.max_memory_gb,
            layers_per_pass=self.layers_per_pass,
            processes=trainer.num_devices,
            owning_ranks=trainer.world_size if self.is_sharded(trainer) else None,
            coupled=self.coupled,
            compiled=self.compile,
        )
        task.collection = session
        metadata = collection_metadata(trainer, task, session.layers)
        if self.coupled:
            metadata["coupled"] = True
        if self.compile:
            metadata["compiled"] = True
            say("compiling before the first batch, and before the first of another shape: a minute or more each")
        course = Course(trainer, session, metadata, self.moments, self.watch, self.save_minutes)
        self._course = course
        course.identity = identity_of(course, self.is_sharded(trainer), trainer)
        state = self._resumed
        current_ranks().agree(state and state.position, f"{course.root}: the state of an interrupted run")
        if state is not None:
            go_on(course, state, trainer)
            self._set_epochs(trainer, task)
        if trainer.is_global_zero:
            course.writer.clear(None if state is None else trainer.ckpt_path)
        if state is None:
            course.choose_texts(trainer, self.reuse)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collected.bring_back()
        if self.factors:
            self.course.share_bases(trainer)

    # -- batches -----------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.plan is None:
            self.course.make_plan(trainer, batch.shape)
            if trainer.is_global_zero:
                progress_console.print(f"plan: {self.plan}")
            self._set_epochs(trainer, task_of(pl_module))
        if self.course.running:
            return
        if self._resumed is not None and self._resumed.max_memory_gb != self.max_memory_gb:
            # It may have died of too little.
            self.course.session.cut_anew(batch.shape, trainer.strategy.broadcast)
        self.course.open(trainer.current_epoch)
        if self._resumed is not None:
            if trainer.ckpt_path is None:
                raise RuntimeError("the sums of an interrupted collection lie beside trainer.ckpt_path, which is None")
            self._resumed.load_sums(self.course.session.capture, Path(trainer.ckpt_path).parent, trainer)
            self._resumed = None

    def _set_epochs(self, trainer: Trainer, task: TaskModule) -> None:
        """One epoch a pass; the unedited model is evaluated once, after the last, or never."""
        passes = self.course.passes
        never = len(passes) + 1
        trainer.fit_loop.max_epochs = len(passes)
        trainer.check_val_every_n_epoch = never if task.skip_baseline else len(passes)
        if len({work.text for work in passes}) > 1 or self._resumed is not None:
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # as its connector does

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % BATCHES_TO_CHECK == 0 or trainer.is_last_batch:
            self.course.session.check_finite(f"batch {batch_idx}")
        n_tokens = self.course.session.capture.positions
        pl_module.log("collect/n_tokens_on_rank_0", n_tokens.float(), reduce_fx="max")
        trainer.should_stop |= self.course.watched_enough(trainer)
        # Before the evaluation, so that it can fail without losing the factors.
        if trainer.is_last_batch or trainer.should_stop:
            self.course.finish(trainer, trainer.current_epoch)
        else:
            self._write_state(trainer, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.course.running:  # stopped early
            self.course.finish(trainer, trainer.current_epoch)

    # -- the state from which an interrupted collection goes on ------------------------------------------

    def _write_state(self, trainer: Trainer, batch_idx: int) -> None:
        next_to_last = batch_idx == trainer.num_training_batches - 2
        asked = next_to_last or batch_idx % BATCHES_TO_CHECK == 0 or not self.save_minutes
        # After the last of trainer.max_steps a run that goes on would find nothing to do.
        asked = asked and trainer.global_step != trainer.max_steps
        if asked and _can_go_on(trainer) and self.course.writer.due(trainer, next_to_last):
            self.course.writer.write(trainer, self.course.session.capture.state())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning stops between two batches, all ranks between the same ones.
        stopped = isinstance(exception, SIGTERMException)
        if stopped and self._running and _can_go_on(trainer):
            self.course.writer.write(trainer, self.course.session.capture.state())

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the state until the model is there."""
        self._resumed = CollectionState.from_dict(state_dict)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leaves this collection's state and the loops' progress: weights do not change."""
        if self._running:
            slim(checkpoint, {self.state_key: asdict(state_of(self.course, self.max_memory_gb, trainer))})

    @property
    def _running(self) -> bool:
        return self._course is not None and self._course.running

    # -- the end -----------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self.keep_state:
            self.course.writer.remove()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._course is not None:
            self._course.session.abandon()


def _can_go_on(trainer: Trainer) -> bool:
    """Whether the loader of the text can be stopped and taken up again."""
    return hasattr(trainer.train_dataloader, "load_state_dict")


def find_collector(trainer: Trainer, needed_by: Callback) -> CurvatureCollector:
    """The trainer's collector, which stands before the callback that needs it: callbacks work in their order.

    Raises:
        InputError: There is none, or it comes later.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, CurvatureCollector):
            return callback
        if callback is needed_by:
            break
    raise InputError(f"{type(needed_by).__name__} needs a CurvatureCollector before it in trainer.callbacks")
