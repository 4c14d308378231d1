"""SnapshotWatch: looks at a collection at every doubling of its tokens, and says when it has seen enough."""

from pathlib import Path
from typing import Any

from lightning import Trainer

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.convergence import Snapshots, SnapshotsState
from lightning_kfac.console import counted, say
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import load_factors, save_factors
from lightning_kfac.factors.kronecker import most_tokens
from lightning_kfac.math.selection import check_rho

SNAPSHOTS = "snapshots"


class SnapshotWatch:
    """Saves a snapshot of the factors at every doubling of the tokens and compares it with the one before.

    Args:
        rho: Of the edit to come.
        stop_overlap: End the collection when no layer's overlap is below this; None never does.

    Raises:
        InputError: A value does not lie in [0, 1].
    """

    def __init__(self, rho: float, stop_overlap: float | None):
        check_rho(rho)
        if stop_overlap is not None and not 0 <= stop_overlap <= 1:
            raise InputError(f"stop_overlap is {stop_overlap}; it must lie in [0, 1]")
        self.snapshots = Snapshots(rho)
        self.stop_overlap = stop_overlap

    def look(
        self, trainer: Trainer, capture: CurvatureCapture, draws: int, tokens: int, metadata: dict[str, Any]
    ) -> bool:
        """After a batch of ``tokens`` tokens on all ranks: whether the collection has seen enough.

        Args:
            draws: Draws of labels a forward pass.
            metadata: Of the factors.
        """
        if not self.snapshots.due(tokens):
            return False
        factors = capture.snapshot(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"), draws)
        overlaps = self.snapshots.compare(factors)
        n_tokens = most_tokens(factors)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / SNAPSHOTS / str(n_tokens)
            save_factors(factors, path, metadata | {"n_tokens": n_tokens})
        said = f"kept sets overlap {min(overlaps.values()):.3f} or more with the last" if overlaps else "the first"
        say(f"snapshot at {counted(n_tokens, 'token')}: {said}")
        if overlaps and trainer.logger is not None:
            figures = {f"overlap/{name}": value for name, value in overlaps.items()}
            trainer.logger.log_metrics(figures | {"collect/n_tokens": n_tokens}, trainer.global_step)
        return bool(overlaps) and self.stop_overlap is not None and min(overlaps.values()) >= self.stop_overlap

    def load_state(self, state: SnapshotsState, root: Path) -> None:
        """Goes on from ``snapshots.state()``, with the snapshot in the run's folder that was the last then."""
        last = state["last"]
        self.snapshots.load_state(state, None if last is None else load_factors(root / SNAPSHOTS / str(last)))
