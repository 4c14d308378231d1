"""How figures are called and shown."""

from collections.abc import Iterable, Mapping
from typing import Any

METRICS = {
    "strict_acc": ("strict accuracy", "{:.3f}"),
    "loose_acc": ("loose accuracy", "{:.3f}"),
    "avg_levenshtein_norm": ("normalised Levenshtein", "{:.3f}"),
    "unchanged": ("not recited: continuation as before", "{:.3f}"),
    "shift_levenshtein_norm": ("not recited: Levenshtein from before", "{:.3f}"),
    "original_len": ("tokens recited from the prefix", "{:.1f}"),
    "stress_len": ("from the best perturbed prompt", "{:.1f}"),
    "stress_difference": ("difference", "{:.1f}"),
    "original_full_match": ("recited to the end, prefix", "{:.3f}"),
    "stress_full_match": ("recited to the end, perturbed", "{:.3f}"),
    "perplexity": ("perplexity, held-out text", "{:.2f}"),
    "perplexity_batch_mean": ("mean of exp(batch loss)", "{:.2f}"),
    "ndcg@10": ("nDCG@10 against the unedited", "{:.4f}"),
    "exact_acc": ("answers right", "{:.3f}"),
}
OF_THE_REST = ("unchanged", "shift_levenshtein_norm")  # what the unedited model does not recite
FEWEST_SHOWN = 10
OF_A_SET = ("strict_acc", "loose_acc", "avg_levenshtein_norm", *OF_THE_REST)
OF_STRESS = ("original_len", "stress_len", "stress_difference", "original_full_match", "stress_full_match")
# Of a sweep, with shorter names.
SWEEP_COLUMNS = {
    "strict_acc": ("strict", "{:.3f}"),
    "exact_acc": ("answers right", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "ndcg@10": ("nDCG@10", "{:.4f}"),
}


def is_telling(key: str, records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any record has the figure; those of what is not recited only where that is more than a few sequences."""
    prefix, slash, kind = key.rpartition("/")
    counted = f"{prefix}{slash}n_not_recited"
    fewest = FEWEST_SHOWN if kind in OF_THE_REST else 0
    return any(key in record and record.get(counted, 0) >= fewest for record in records)
