"""The metrics as pure functions; the classes in ``lightning_kfac.metrics`` only accumulate them."""

from lightning_kfac.metrics.functional.memorization import LOOSE_SIMILARITY, Recitation, cut_after_end, recitation
from lightning_kfac.metrics.functional.ndcg import ndcg, top_tokens
from lightning_kfac.metrics.functional.perplexity import token_losses
from lightning_kfac.metrics.functional.stress import stress_length

__all__ = [
    "LOOSE_SIMILARITY",
    "Recitation",
    "cut_after_end",
    "ndcg",
    "recitation",
    "stress_length",
    "token_losses",
    "top_tokens",
]
