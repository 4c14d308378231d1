"""torchmetrics classes: what the model recites and how well it still works."""

from typing import TYPE_CHECKING

from lightning_kfac.lazy import lazy

if TYPE_CHECKING:
    from lightning_kfac.metrics.continuation_shift import ContinuationShift
    from lightning_kfac.metrics.exact_answer import ExactAnswer
    from lightning_kfac.metrics.extraction import Extraction
    from lightning_kfac.metrics.leaks import Membership
    from lightning_kfac.metrics.loss_change import LossChange
    from lightning_kfac.metrics.memorization import Memorization
    from lightning_kfac.metrics.ndcg import NDCG
    from lightning_kfac.metrics.perplexity import BatchMeanPerplexity, Perplexity
    from lightning_kfac.metrics.position_stress import PositionStress
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "lightning_kfac.metrics.continuation_shift": ["ContinuationShift"],
            "lightning_kfac.metrics.exact_answer": ["ExactAnswer"],
            "lightning_kfac.metrics.extraction": ["Extraction"],
            "lightning_kfac.metrics.leaks": ["Membership"],
            "lightning_kfac.metrics.loss_change": ["LossChange"],
            "lightning_kfac.metrics.memorization": ["Memorization"],
            "lightning_kfac.metrics.ndcg": ["NDCG"],
            "lightning_kfac.metrics.perplexity": ["BatchMeanPerplexity", "Perplexity"],
            "lightning_kfac.metrics.position_stress": ["PositionStress"],
        },
        rooms=["functional"],
    )

__all__ = [
    "NDCG",
    "BatchMeanPerplexity",
    "ContinuationShift",
    "ExactAnswer",
    "Extraction",
    "LossChange",
    "Membership",
    "Memorization",
    "Perplexity",
    "PositionStress",
]
