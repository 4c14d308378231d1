"""torchmetrics classes: what the model recites and how well it still works."""

from lightning_kfac.metrics.exact_answer import ExactAnswer
from lightning_kfac.metrics.memorization import Memorization
from lightning_kfac.metrics.ndcg import NDCG
from lightning_kfac.metrics.perplexity import Perplexity

__all__ = ["NDCG", "ExactAnswer", "Memorization", "Perplexity"]
