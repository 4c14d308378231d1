"""The metrics as pure functions; the classes in ``lightning_kfac.metrics`` only accumulate them."""

from lightning_kfac.metrics.functional.memorization import Recitation, recitation
from lightning_kfac.metrics.functional.ndcg import ndcg, top_tokens
from lightning_kfac.metrics.functional.perplexity import token_nll

__all__ = ["Recitation", "ndcg", "recitation", "token_nll", "top_tokens"]
