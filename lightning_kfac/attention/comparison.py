"""What crystallized attention costs, and how much of the cost each rank recovers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_kfac.math.statistics import Estimate, perplexity, resampled_perplexities
from lightning_kfac.storage.json_files import for_json

BASELINE = "baseline"
TOP1 = "top1"
FULL = "full"
ENOUGH = 0.9


def lowrank(rank: int) -> str:
    """Name of the low-rank mode with this rank."""
    return f"lowrank {rank}"


@dataclass(frozen=True)
class Cost:
    """One way to run the model, against the unchanged one.

    Attributes:
        perplexity: On the held-out text.
        change: Relative to the unchanged model: 0.1 is 10 % more.
    """

    perplexity: float
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """Costs by name, and what of the Top-1 loss comes back.

    Attributes:
        costs: ``top1``, ``full``, ``lowrank R``, and whatever else was measured.
        recovered: Share of the Top-1 loss that each rank recovers, by rank: (ppl of Top-1 - ppl of the rank) /
            (ppl of Top-1 - ppl unchanged). None where Top-1 costs no more than its own interval.
        enough: The smallest rank that recovers 90 %; infinite where none does (in JSON null). None as above.
        n_documents: Number of held-out documents, which the intervals resample; of one there are none (NaN).
    """

    costs: dict[str, Cost]
    recovered: dict[int, Estimate] | None
    enough: Estimate | None
    n_documents: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: they are null."""
        return for_json(asdict(self))


def compare(losses: Mapping[str, np.ndarray], counts: np.ndarray, ranks: Sequence[int]) -> Comparison:
    """Paired comparison of everything measured on the same documents.

    Args:
        losses: float64 [R] by name: ``baseline``, ``top1``, a ``lowrank`` for each rank, and others.
        counts: [R], targets of each document.
        ranks: Ascending.
    """
    names = list(losses)
    matrix = np.stack([losses[name] for name in names])
    measured = dict(zip(names, perplexity(matrix, counts), strict=True))
    draws = dict(zip(names, resampled_perplexities(matrix, counts).T, strict=True))
    base = measured[BASELINE]
    base_draws = draws[BASELINE]
    costs = {
        name: Cost(float(measured[name]), Estimate.of(measured[name] / base - 1, draws[name] / base_draws - 1))
        for name in names
    }
    if not costs[TOP1].change.low > 0:
        return Comparison(costs, None, None, len(counts))
    share = np.array([_recovered(measured, rank) for rank in ranks])
    share_draws = np.stack([_recovered(draws, rank) for rank in ranks])
    recovered = {rank: Estimate.of(share[i], share_draws[i]) for i, rank in enumerate(ranks)}
    enough = Estimate.of(_smallest(share[:, None], ranks)[0], _smallest(share_draws, ranks))
    return Comparison(costs, recovered, enough, len(counts))


def _recovered(perplexities: Mapping[str, np.ndarray], rank: int) -> np.ndarray:
    lost = perplexities[TOP1] - perplexities[BASELINE]
    return (perplexities[TOP1] - perplexities[lowrank(rank)]) / lost


def _smallest(shares: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """The first rank with a share of 0.9 or more in each column of shares [ranks, n]; infinity where there is none."""
    reached = shares >= ENOUGH
    return np.where(reached.any(0), np.array(ranks, dtype=float)[reached.argmax(0)], np.inf)
