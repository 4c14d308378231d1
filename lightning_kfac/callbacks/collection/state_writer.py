"""When the state of a collection is written, and where: ``state/step-N/`` in the run's folder, the last two kept."""

import time
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from lightning_kfac.console import say
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.storage.json_files import read_json, write_json
from lightning_kfac.storage.manifest import remove_ours
from lightning_kfac.storage.run_folder import STATE
from lightning_kfac.storage.tensor_files import save_tensors

CHECKPOINT = "checkpoint.json"
ADVICE = "name an older state with --ckpt_path, or add --overwrite to begin anew"
STEPS_KEPT = 2
SECONDS_A_MINUTE = 60.0
# The last state of a pass is worth writing when this share of the usual interval has gone by.
LAST_SHARE = 0.2
# The last state of a pass is written at the latest after so long.
SECONDS_AT_RISK = 60.0
# No state is written more often than so many times as long as the last one took.
TIMES_ITS_COST = 20.0


class SlimCheckpointIO(TorchCheckpointIO):
    """Reads and writes the checkpoint of a collection as JSON: it holds progress only, no tensor and no code.

    Checkpoints of another name, those of a training, are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes it, or leaves nothing: other ranks wait, so a full disk must not raise here."""
        if Path(path).name != CHECKPOINT:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_json(path, checkpoint)
        except (OSError, InputError, TypeError, ValueError):
            Path(path).unlink(missing_ok=True)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
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
        self.folder = root / STATE
        self.seconds = minutes * SECONDS_A_MINUTE
        self._last = time.monotonic()
        self._cost = 0.0

    def clear(self, resumed: str | Path | None) -> None:
        """Removes the states that this run does not go on from, and what a kill left of one."""
        going_on = None if resumed is None else Path(resumed).parent
        for path in self.folder.glob("step-*"):
            if path.suffix == ".part" or going_on is None or path.name > going_on.name:
                remove_ours(path)
        for path in self.folder.glob("pass-*") if resumed is None else ():
            remove_ours(path)

    def remove(self) -> None:
        """Removes all of them."""
        remove_ours(self.folder)

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
            remove_ours(partial)
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
            remove_ours(partial)
            say(f"note: the state of the collection could not be saved ({troubles[0]})")
        elif trainer.is_global_zero:
            remove_ours(self.folder / name)
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
            remove_ours(old)


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
