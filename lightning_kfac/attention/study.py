"""What a study of crystallized attention has found, and what it says in plain words."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_kfac.attention.comparison import BASELINE, TOP1, Comparison, for_json
from lightning_kfac.attention.spectra import ResidualSpectra
from lightning_kfac.console import counted
from lightning_kfac.math.statistics import Estimate

SHOWN_RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Head:
    """One attention head of a studied layer.

    Attributes:
        effective_dimension: Directions that hold 90 % of the residuals' variance.
        cumulative_variance: Share of the variance by number of directions.
        entropy: Mean entropy of its attention, in nats.
        top1_mass: Mean of its largest probability.
        cost: Relative change of perplexity with Top-1 in this head alone.
    """

    layer: int
    head: int
    effective_dimension: int
    cumulative_variance: dict[int, float]
    entropy: float
    top1_mass: float
    cost: Estimate


@dataclass(frozen=True)
class Study:
    """Everything that was measured.

    Attributes:
        comparison: Costs of every mode; ``layer L`` and ``layer L head H`` are Top-1 there alone.
        spectra: Of the residuals of the studied layers.
        recited: Strict accuracy and number of sequences of the memorized set by mode; None where there is no set.
    """

    comparison: Comparison
    spectra: ResidualSpectra
    recited: Mapping[str, tuple[float, int] | None]

    @property
    def width(self) -> int:
        """Width of a head."""
        return next(iter(self.spectra.values())).variances.shape[-1]

    @property
    def heads(self) -> list[Head]:
        """Every head of the studied layers."""
        found = []
        for layer, spectra in self.spectra.items():
            dimensions = spectra.effective_dimension().tolist()
            shares = spectra.cumulative_variance
            for head, dimension in enumerate(dimensions):
                held = {rank: shares[head, rank - 1].item() for rank in SHOWN_RANKS if rank <= shares.shape[1]}
                cost = self.comparison.costs[f"layer {layer} head {head}"].change
                sharpness = spectra.entropy[head].item(), spectra.top1_mass[head].item()
                found.append(Head(layer, head, dimension, held, *sharpness, cost))
        return found

    @property
    def layer_costs(self) -> dict[int, Estimate]:
        """Cost of Top-1 in one layer alone, for every attention layer of the model."""
        names = {name: name.split() for name in self.comparison.costs}
        alone = {int(words[1]): name for name, words in names.items() if words[0] == "layer" and len(words) == 2}
        return {layer: self.comparison.costs[name].change for layer, name in alone.items()}

    @property
    def mean_effective_dimension(self) -> float:
        """Over the heads of the studied layers."""
        return sum(head.effective_dimension for head in self.heads) / len(self.heads)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.comparison.to_dict(),
            "heads": for_json([asdict(head) for head in self.heads]),
            "mean_effective_dimension": self.mean_effective_dimension,
            "recited": dict(self.recited),
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """The findings in a few sentences, each figure with its 95 % interval."""
        top1 = self.comparison.costs[TOP1].change
        where = f"layer{'s' if len(self.spectra) > 1 else ''} {_listed(self.spectra)}"
        direction = "raises" if top1.low > 0 else "lowers" if top1.high < 0 else "hardly changes"
        sentences = [
            f"Top-1 attention in {where} {direction} the held-out perplexity: {percent(top1)}, 95 % interval of a "
            f"paired bootstrap over {counted(self.comparison.n_documents, 'document')}.",
            self._compressibility(),
            f"Of the residuals' variance, 90 % lies in {self.mean_effective_dimension:.1f} of {self.width} directions "
            "in the mean over the heads.",
        ]
        before = self.recited.get(BASELINE)
        after = self.recited.get(TOP1)
        if before is not None and after is not None:
            counts = [f"{round(accuracy * n)}" for accuracy, n in (before, after)]
            many = counted(before[1], "memorized sequence")
            sentences.append(f"Of {many} it recites {counts[1]} ({counts[0]} unchanged).")
        return " ".join(sentences)

    def _compressibility(self) -> str:
        recovered = self.comparison.recovered
        enough = self.comparison.enough
        if recovered is None or enough is None:
            return "There is no loss beyond its own interval, so none to recover."
        if enough.value == float("inf"):
            rank, best = max(recovered.items(), key=lambda item: item[1].value)
            return f"No rank that was tried recovers 90 % of the loss; rank {rank} recovers {percent(best, 0)}."
        rank = int(enough.value)
        word = _word(enough.value / self.width)
        cautious = _word(enough.high / self.width)
        word += "" if word == cautious else f" (at the end of the interval {cautious})"
        return (
            f"The loss is {word}: rank {rank} of {self.width} is the smallest that was "
            f"tried to recover 90 % of it (interval {enough.low:g} to {enough.high:g}), and recovers "
            f"{percent(recovered[rank], 0)}."
        )


def percent(estimate: Estimate, digits: int = 1) -> str:
    """A share with its interval, if it has one.

    Example:
        >>> percent(Estimate(0.123, 0.1, 0.15))
        '12.3 % (10.0 to 15.0)'
    """
    if math.isnan(estimate.low):
        return f"{round(100 * estimate.value, digits) + 0.0:.{digits}f} % (interval n/a)"
    ends = estimate.value, estimate.low, estimate.high
    value, low, high = (f"{round(100 * x, digits) + 0.0:.{digits}f}" for x in ends)  # no -0.0
    return f"{value} % ({low} to {high})"


def _word(share: float) -> str:
    """For the share of a head's directions that is needed."""
    return "compressible" if share <= 1 / 4 else "partly compressible" if share <= 1 / 2 else "hardly compressible"


def _listed(numbers: Iterable[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} and {last}" if front else last
