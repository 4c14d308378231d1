"""nDCG@k of one model's next-token ranking against another's."""

import torch
from torch import Tensor

# The integers that stand for logits take two to four times their memory, so few exist at once.
POSITIONS_AT_ONCE = 256
TOKENS_AT_ONCE = 1 << 14


def top_tokens(logits: Tensor, k: int = 10) -> Tensor:
    """The k highest tokens of each position in descending order, ties by the lowest token id.

    Args:
        logits: [..., V], ranked in float32.

    Returns:
        int64 [..., k].
    """
    flat = logits.flatten(0, -2)
    parts = [_top_of_slice(flat[i : i + POSITIONS_AT_ONCE], k) for i in range(0, len(flat), POSITIONS_AT_ONCE)]
    return torch.cat(parts).unflatten(0, logits.shape[:-1])


def _top_of_slice(logits: Tensor, k: int) -> Tensor:
    vocabulary = logits.shape[-1]
    best = _highest(_rank_keys(logits, 0), k)
    for start in range(TOKENS_AT_ONCE, vocabulary, TOKENS_AT_ONCE):
        best = _highest(torch.cat([best, _rank_keys(logits, start)], dim=-1), k)
    return vocabulary - 1 - (best & 0xFFFFFFFF)


def _rank_keys(logits: Tensor, start: int) -> Tensor:
    """Integers that rank the tokens from ``start`` on like their logits, ties by the lowest id."""
    # torch.topk leaves ties open. So rank unique integers instead: a float's bits, mapped so that
    # they order like the floats (and -0.0 equals 0.0), above the reversed token id.
    bits = (logits[:, start : start + TOKENS_AT_ONCE].float() + 0.0).view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()
    ids = torch.arange(start, start + bits.shape[1], device=logits.device)
    return (ordered << 32) | (logits.shape[-1] - 1 - ids)


def _highest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[-1]), dim=-1).values


def ndcg(ranking: Tensor, reference: Tensor) -> Tensor:
    """nDCG@k of each position, in float64.

    The i-th token of ``reference`` (i = 0, 1, ...) has relevance k - i, every other token 0; the
    token ranked r-th (r = 1, 2, ...) is discounted by 1 / log2(r + 1); the sum is divided by that of
    the ideal ranking (Jarvelin and Kekalainen, 2002, with linear gain).

    Args:
        ranking: int64 [..., k], the judged model's top tokens.
        reference: int64 [..., k], the reference model's top tokens.

    Returns:
        float64 [...]; exactly 1 where the two rankings are equal.
    """
    k = reference.shape[-1]
    relevance = torch.arange(k, 0, -1, dtype=torch.float64, device=reference.device)
    discount = torch.arange(2, k + 2, dtype=torch.float64, device=reference.device).log2().reciprocal()
    gained = ((ranking[..., :, None] == reference[..., None, :]) * relevance).sum(-1)
    return (gained * discount).sum(-1) / (relevance * discount).sum()
