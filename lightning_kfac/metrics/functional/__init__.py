"""The metrics as pure functions; the classes in ``lightning_kfac.metrics`` only accumulate them."""

from lightning_kfac.metrics.functional.extraction import (
    Decoding,
    expected_share,
    extracted_in,
    extraction_rates,
    log_probabilities,
    prior_ratio,
    reaches,
    tries_needed,
)
from lightning_kfac.metrics.functional.leaks import (
    Leaks,
    TokenStatistics,
    exact_match,
    extraction_strength,
    mean_loss,
    min_k,
    min_k_plus_plus,
    reference_ratio,
    token_statistics,
    zlib_ratio,
)
from lightning_kfac.metrics.functional.memorization import LOOSE_SIMILARITY, Recitation, cut_after_end, recitation
from lightning_kfac.metrics.functional.ndcg import ndcg, top_tokens
from lightning_kfac.metrics.functional.near_verbatim import log_near_verbatim
from lightning_kfac.metrics.functional.perplexity import token_losses
from lightning_kfac.metrics.functional.stress import stress_length

__all__ = [
    "LOOSE_SIMILARITY",
    "Decoding",
    "Leaks",
    "Recitation",
    "TokenStatistics",
    "cut_after_end",
    "exact_match",
    "expected_share",
    "extracted_in",
    "extraction_rates",
    "extraction_strength",
    "log_near_verbatim",
    "log_probabilities",
    "mean_loss",
    "min_k",
    "min_k_plus_plus",
    "ndcg",
    "prior_ratio",
    "reaches",
    "recitation",
    "reference_ratio",
    "stress_length",
    "token_losses",
    "token_statistics",
    "top_tokens",
    "tries_needed",
    "zlib_ratio",
]
