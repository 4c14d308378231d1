"""torchmetrics classes: what the model recites and how well it still works."""

from lightning_kfac.metrics.continuation_shift import ContinuationShift
from lightning_kfac.metrics.exact_answer import ExactAnswer
from lightning_kfac.metrics.loss_change import LossChange
from lightning_kfac.metrics.memorization import Memorization
from lightning_kfac.metrics.ndcg import NDCG
from lightning_kfac.metrics.perplexity import BatchMeanPerplexity, Perplexity
from lightning_kfac.metrics.position_stress import PositionStress

__all__ = [
    "NDCG",
    "BatchMeanPerplexity",
    "ContinuationShift",
    "ExactAnswer",
    "LossChange",
    "Memorization",
    "Perplexity",
    "PositionStress",
]
