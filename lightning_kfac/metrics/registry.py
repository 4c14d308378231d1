"""Every metric of an evaluation, in the order of tables."""

from lightning_kfac.metrics.continuation_shift import ContinuationShift
from lightning_kfac.metrics.described import Described, Group, Label
from lightning_kfac.metrics.exact_answer import ExactAnswer
from lightning_kfac.metrics.loss_change import LossChange
from lightning_kfac.metrics.memorization import Memorization
from lightning_kfac.metrics.ndcg import NDCG
from lightning_kfac.metrics.perplexity import BatchMeanPerplexity, LossPerplexity
from lightning_kfac.metrics.position_stress import PositionStress

MEASURED: tuple[type[Described], ...] = (
    Memorization,
    ContinuationShift,
    PositionStress,
    LossPerplexity,
    BatchMeanPerplexity,
    NDCG,
    LossChange,
    ExactAnswer,
)
LABELS: dict[str, Label] = {name: label for metric in MEASURED for name, label in metric.labels.items()}


def names_of(group: Group) -> list[str]:
    """The figures under one heading."""
    return [name for metric in MEASURED if metric.group == group for name in metric.labels]
