"""The state of an unfinished collection: ``state/step-N/`` in the run's folder, the last two kept.

Each rank writes its own sums beside one slim Lightning checkpoint. A step appears under its name when all of it is
there.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning import Trainer

from lightning_kfac.callbacks.collection.passes import Pass
from lightning_kfac.callbacks.collection.state_writer import ADVICE, rank_file
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.convergence import SnapshotsState
from lightning_kfac.collection.memory import MemoryPlan
from lightning_kfac.data.loaders import Position
from lightning_kfac.errors import InputError
from lightning_kfac.storage.tensor_files import load_tensors

# Metadata that only some collections have.
OF_SOME = ("coupled",)


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
    position: Position
    snapshots: SnapshotsState | None
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
        for key in dict.fromkeys((*identity, *OF_SOME)):
            value = identity.get(key)
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
            capture.load_state(load_tensors(rank_file(step, trainer.global_rank), ADVICE))
            return
        for rank in range(self.world_size) if trainer.is_global_zero else ():
            capture.add_state(load_tensors(rank_file(step, rank), ADVICE))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
