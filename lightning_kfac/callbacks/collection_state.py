"""The state of an unfinished collection: ``state/step-N/`` in the run's folder, the last two kept.

Each rank writes its own sums beside one slim Lightning checkpoint. A step appears under its name when all of it is
there.
"""

import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_kfac.callbacks.passes import Pass
from lightning_kfac.capture import CurvatureCapture
from lightning_kfac.data.loading import Position
from lightning_kfac.errors import InputError
from lightning_kfac.json_files import read_json, write_json
from lightning_kfac.plan import MemoryPlan
from lightning_kfac.progress import say
from lightning_kfac.ranks import current_ranks
from lightning_kfac.run_folder import STATE
from lightning_kfac.tensor_files import load_tensors, save_tensors

CHECKPOINT = "checkpoint.json"
STEPS_KEPT = 2
SECONDS_A_MINUTE = 60.0
# The last state of a pass is worth writing when this share of the usual interval has gone by.
LAST_SHARE = 0.2
ADVICE = "name an older state with --ckpt_path, or add --overwrite to begin anew"
# The last state of a pass is written at the latest after so long, and no state more often than so many times as long
# as the last one took.
SECONDS_AT_RISK, TIMES_ITS_COST = 60.0, 20.0


@dataclass(frozen=True)
class CollectionState:
    """What a collection is and how far it has come, beside its sums and Lightning's own progress.

    Attributes:
        identity: What must be the same in the run that goes on: metadata of the factors, layers, options.
        world_size: Ranks that wrote their sums.
        n_tokens: Of the corpus, once it has been read.
        plan: The passes and how batches are cut.
        passes: All of them; ``number`` is the present one.
        batch_tokens: Tokens of a full batch of one rank.
        leaders: Which layers share an input with which.
        position: In the text of the present pass.
        snapshots: Where the doubling of tokens is watched, see ``Snapshots.state``.
        max_memory_gb: The cap for which batches were cut.
    """

    identity: dict[str, Any]
    world_size: int
    n_tokens: int | None
    plan: MemoryPlan
    passes: list[Pass]
    number: int
    batch_tokens: int
    leaders: dict[str, str]
    position: Position
    snapshots: dict[str, int] | None
    max_memory_gb: float | None

    @classmethod
    def from_dict(cls, contents: dict[str, Any]) -> "CollectionState":
        """What ``asdict`` and JSON made of one; raises ``InputError`` where it is none."""
        try:
            known = {field.name: contents[field.name] for field in fields(cls)}
            plan = dict(known["plan"]) | {"passes": tuple(map(tuple, known["plan"]["passes"]))}
            passes = [Pass(work["text"], tuple(work["layers"]), work["moments"]) for work in known["passes"]]
            return cls(**known | {"plan": MemoryPlan(**plan), "passes": passes})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the state of the interrupted collection cannot be used ({error!r}); {ADVICE}") from None

    def check(self, identity: dict[str, Any], folder: Path) -> None:
        """Raises ``InputError`` where another collection is asked for than the one in the folder."""
        for key, value in identity.items():
            if (theirs := self.identity.get(key)) != value:
                if key in ("text", "rows"):
                    raise InputError(
                        f"{folder} holds an unfinished run on other text: a corpus is another one or its files have "
                        f"changed (names, sizes or times), or it is cut or mixed in another way; {ADVICE}"
                    )
                raise InputError(
                    f"{folder} holds an unfinished run whose {key} is {_short(theirs)}, here it is {_short(value)}: "
                    f"run its own command to go on with it, or {ADVICE}"
                )

    def load_sums(self, capture: CurvatureCapture, step: Path, trainer: Trainer) -> None:
        """Gives a capture this rank's sums. With another number of ranks, rank 0 takes those of all."""
        if self.world_size == trainer.world_size:
            capture.load_state(load_tensors(rank_file(step, trainer.global_rank), ADVICE), self.leaders)
            return
        capture.share_inputs(self.leaders)
        for rank in range(self.world_size) if trainer.is_global_zero else ():
            capture.add_state(load_tensors(rank_file(step, rank), ADVICE))


class SlimCheckpointIO(TorchCheckpointIO):
    """Reads and writes the checkpoint of a collection as JSON: it holds progress only, no tensor and no code.

    Checkpoints of another name, those of a training, are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes it, or leaves nothing: other ranks wait, so a full disk must not raise here."""
        if Path(path).name != CHECKPOINT:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_json(path, checkpoint)
        except (OSError, InputError, TypeError, ValueError):
            Path(path).unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Reads it."""
        if Path(path).name != CHECKPOINT:
            return super().load_checkpoint(path, map_location, weights_only=True)
        checkpoint = read_json(path, ADVICE)
        if not {"loops", "callbacks", "state_dict"} <= checkpoint.keys():
            raise InputError(f"{path}: not the state of a collection; {ADVICE}")
        return checkpoint


class StateWriter:
    """Decides when to write a state, and writes it.

    Args:
        root: The run's folder.
        minutes: Between two states.
    """

    def __init__(self, root: Path, minutes: float):
        self.folder, self.seconds = root / STATE, minutes * SECONDS_A_MINUTE
        self._last, self._cost = time.monotonic(), 0.0

    def clear(self, resumed: str | Path | None) -> None:
        """Removes the states that this run does not go on from, and what a kill left of one."""
        going_on = None if resumed is None else Path(resumed).parent
        for path in self.folder.glob("step-*"):
            if path.suffix == ".part" or going_on is None or path.name > going_on.name:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("pass-*") if resumed is None else ():
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def due(self, trainer: Trainer, is_next_to_last: bool) -> bool:
        """Whether any rank finds it is time; every rank must ask."""
        passed = time.monotonic() - self._last
        wait = min(LAST_SHARE * self.seconds, SECONDS_AT_RISK) if is_next_to_last else self.seconds
        due = passed >= max(wait, self._cost if self.seconds else 0.0)
        return trainer.strategy.reduce_boolean_decision(due, all=False)

    def write(self, trainer: Trainer, sums: dict[str, Tensor]) -> None:
        """Writes the state of all ranks; where a disk is full, says so and goes on without.

        Args:
            sums: Of this rank.
        """
        begin = time.monotonic()
        name = f"step-{trainer.global_step:010d}"
        partial = self.folder / f"{name}.part"
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.strategy.barrier("state")
        why = None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_tensors(sums, rank_file(partial, trainer.global_rank))
        except (OSError, InputError) as error:
            why = str(error)
        troubles = [trouble for trouble in current_ranks().gather(why) if trouble]
        if not troubles:
            trainer.save_checkpoint(partial / CHECKPOINT)
            troubles = trainer.strategy.broadcast(_missing(partial, trainer.world_size))
        if troubles:
            shutil.rmtree(partial, ignore_errors=True)
            say(f"note: the state of the collection could not be saved ({troubles[0]})")
        elif trainer.is_global_zero:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            partial.rename(self.folder / name)
            self._prune()
        trainer.strategy.barrier("state written")
        self._last = time.monotonic()
        self._cost = TIMES_ITS_COST * (self._last - begin)

    def part(self, number: int) -> Path:
        """Where the results of a finished pass wait for those of the others over the same text."""
        return self.folder / f"pass-{number:04d}"

    def _prune(self) -> None:
        for old in steps(self.folder.parent)[:-STEPS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _missing(step: Path, ranks: int) -> list[str]:
    """What is not there although every rank has written."""
    if not (step / CHECKPOINT).is_file():
        return [f"{step / CHECKPOINT}: cannot be written"]
    absent = [rank for rank in range(ranks) if not rank_file(step, rank).is_file()]
    return [f"{step} must be on a disk that all nodes share: rank {rank} wrote elsewhere" for rank in absent]


def steps(root: Path) -> list[Path]:
    """The whole states in a run's folder, oldest first."""
    found = (root / STATE).glob("step-*/" + CHECKPOINT)
    return sorted(path.parent for path in found if path.parent.suffix != ".part")


def latest_checkpoint(root: Path) -> Path | None:
    """The newest state's Lightning checkpoint, for ``trainer.fit(ckpt_path=...)``."""
    found = steps(root)
    return found[-1] / CHECKPOINT if found else None


def checkpoint_in(path: Path, root: Path) -> Path:
    """The checkpoint that a user named: the folder of a step, or the file in it."""
    path = path if path.name == CHECKPOINT else path / CHECKPOINT
    if not path.is_file() or path.resolve().parents[2] != root.resolve():
        raise InputError(
            f"ckpt_path: {path.parent} is not the state of a collection in {root}; name one of {root / STATE}/step-*, "
            "or `last`"
        )
    return path


def step_of(checkpoint: str | Path) -> int:
    """The global step at which a checkpoint was written."""
    return int(Path(checkpoint).parent.name.removeprefix("step-"))


def rank_file(step: Path, rank: int) -> Path:
    """Where a rank keeps its sums."""
    return step / f"rank-{rank:05d}.safetensors"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
