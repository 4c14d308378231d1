"""Going on with an interrupted collection: what its state says of its course, and how another takes it up."""

from typing import Any

from lightning import Trainer

from lightning_kfac.callbacks.collection.course import Course
from lightning_kfac.callbacks.collection.state import CollectionState
from lightning_kfac.callbacks.collection.state_writer import ADVICE
from lightning_kfac.callbacks.collection.task import TextsInTurn, name_in_turn
from lightning_kfac.callbacks.typed import data_module
from lightning_kfac.collection.convergence import SnapshotsState
from lightning_kfac.console import say
from lightning_kfac.data.names import CORPUS
from lightning_kfac.errors import InputError

# What Lightning needs of its checkpoint to go on with a collection.
KEPT = {"epoch", "global_step", "pytorch-lightning_version", "loops", "optimizer_states", "lr_schedulers"}


def state_of(course: Course, max_memory_gb: float | None, trainer: Trainer) -> CollectionState:
    """How far a collection has come, in the middle of a pass."""
    loader = trainer.train_dataloader
    if loader is None:
        raise RuntimeError("no text is being read: a state is that of a fit in the middle of a pass")
    return CollectionState(
        identity=course.identity,
        world_size=trainer.world_size,
        n_tokens=course.metadata.get("n_tokens"),
        plan=course.session.plan,
        passes=course.passes,
        number=trainer.current_epoch,
        batch_tokens=course.batch_tokens,
        position=loader.state_dict(),
        snapshots=None if course.watch is None else course.watch.snapshots.state(),
        max_memory_gb=max_memory_gb,
    )


def slim(checkpoint: dict[str, Any], callbacks: dict[str, Any]) -> None:
    """Leaves of Lightning's checkpoint, in place, the loops' progress and what some callbacks keep."""
    for key in checkpoint.keys() - KEPT:  # whatever else a user's own classes would keep
        del checkpoint[key]
    checkpoint["callbacks"] = callbacks
    checkpoint["state_dict"] = {}


def go_on(course: Course, state: CollectionState, trainer: Trainer) -> None:
    """Takes up passes, plan and results of the interrupted collection.

    Raises:
        InputError: It is of something else, or cannot go on with this number of ranks.
    """
    root = course.root
    data = data_module(trainer)
    state.check(course.identity, root)
    if state.n_tokens is not None:
        course.metadata["n_tokens"] = state.n_tokens
    if state.world_size != trainer.world_size and (state.plan.owners or not isinstance(data, TextsInTurn)):
        raise InputError(f"{root}: the interrupted collection can go on with {state.world_size} ranks only")
    course.session.plan = state.plan
    course.batch_tokens = state.batch_tokens
    course.passes = state.passes
    course.collected.owners = state.plan.owners
    for number, work in enumerate(state.passes[: state.number]):
        course.collected.load_part(work, course.writer.part(number))
    if CORPUS not in {work.text for work in state.passes if not work.moments}:
        course.collected.reuse(course.metadata, list(course.session.layers))
    if course.watch is not None:
        course.watch.load_state(_snapshots(state), root)
    if isinstance(data, TextsInTurn):
        data.text_in_turn = name_in_turn(state.passes[state.number].text)
        data.resume_at = state.position
    of = "" if len(state.passes) == 1 else f" of pass {state.number + 1}"
    say(f"going on after batch {state.position['batches']:,}{of}, where this run was interrupted")


def _snapshots(state: CollectionState) -> SnapshotsState:
    if state.snapshots is None:
        raise InputError(f"the state of the interrupted collection says nothing of its snapshots; {ADVICE}")
    return state.snapshots


def identity_of(course: Course, sharded: bool, trainer: Trainer) -> dict[str, Any]:
    """What must be the same in a run that goes on with this one. Read when the run begins: its files may change later.

    Args:
        sharded: Each rank keeps the factors of its own layers only.
    """
    data = data_module(trainer)
    rows: dict[str, str] = {}
    if isinstance(data, TextsInTurn):
        rows = {name: data.rows_identity(name) for name in (CORPUS, *data.domains)}
    # The rows' identity knows tokenizer and documents; a run of version 0.1 knows no other.
    left_out = ("world_size", "n_tokens", "n_documents", "tokenizer_fingerprint")
    known = {key: value for key, value in course.metadata.items() if key not in left_out}
    return known | {
        "layers": list(course.session.layers),
        "moments": course.moments,
        "watch_rho": course.watch and course.watch.snapshots.rho,
        "shard_factors": sharded,
        "rows": rows,
    }
