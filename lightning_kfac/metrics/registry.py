"""Every metric of an evaluation, in the order of tables."""

from lightning_kfac.metrics.continuation_shift import ContinuationShift
from lightning_kfac.metrics.described import Described, Group, Label
from lightning_kfac.metrics.exact_answer import ExactAnswer
from lightning_kfac.metrics.extraction import Extraction
from lightning_kfac.metrics.image_labels import ValidationImages, WrongLabels
from lightning_kfac.metrics.leaks import Membership
from lightning_kfac.metrics.loss_change import LossChange
from lightning_kfac.metrics.memorization import Memorization
from lightning_kfac.metrics.ndcg import NDCG
from lightning_kfac.metrics.near_verbatim import NearVerbatim, PriorRatio
from lightning_kfac.metrics.perplexity import BatchMeanPerplexity, LossPerplexity
from lightning_kfac.metrics.position_stress import PositionStress

MEASURED: tuple[type[Described], ...] = (
    Memorization,
    Extraction,
    NearVerbatim,
    PriorRatio,
    ContinuationShift,
    PositionStress,
    LossPerplexity,
    BatchMeanPerplexity,
    NDCG,
    LossChange,
    ExactAnswer,
    Membership,
    WrongLabels,
    ValidationImages,
)
LABELS: dict[str, Label] = {name: label for metric in MEASURED for name, label in metric.labels.items()}


def names_of(group: Group) -> list[str]:
    """The rows of tables under one heading."""
    labels = [metric.labels for metric in MEASURED if metric.group == group]
    return [name for some in labels for name, label in some.items() if not label.aside]
