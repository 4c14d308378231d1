"""How likely it is that a sequence is drawn word for word, and what that means for many tries (arXiv 2410.19482).

A decoding scheme turns logits into the distribution that is drawn from; the probability of a sequence is the product
over its tokens. One teacher-forced forward gives all of it, so nothing is sampled.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional.ndcg import top_tokens

# Of float64 logits, where all of them are needed.
VALUES_AT_ONCE = 1 << 22
# A probability that equals a bound but for rounding reaches it.
SLACK = 1e-12


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: temperature, then top-k, then top-p, renormalised, as ``generate`` does.

    Args:
        temperature: Logits are divided by it.
        top_k: So many of the likeliest tokens can be drawn, of equal ones those with the lowest ids; null takes all.
        top_p: Of these, the likeliest until their mass reaches it; 1 takes all.
    """

    temperature: float = 1.0
    top_k: int | None = 40
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(f"extraction.temperature is {self.temperature}; it must be greater than 0, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"extraction.top_k is {self.top_k}; it must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"extraction.top_p is {self.top_p}; it must be greater than 0, and at most 1")


def log_probabilities(logits: Tensor, wanted: Tensor, decoding: Decoding) -> Tensor:
    """Logarithm of the probability that each position's wanted token is drawn.

    Ranks are those of the logits, ties by the lowest token id. A token is within top-p while the mass of those ranked
    above it is below ``top_p`` (Holtzman et al., 2020, as transformers' ``TopPLogitsWarper`` has it).

    Args:
        logits: [..., V], finite or -inf.
        wanted: int64 [...], token ids.

    Returns:
        float64 [...], at most 0; -inf for tokens that are never drawn.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(3, 1)
        >>> log_probabilities(logits, torch.arange(3), Decoding(top_k=2)).exp()
        tensor([0.6667, 0.3333, 0.0000], dtype=torch.float64)
    """
    flat = logits.flatten(0, -2)
    ids = wanted.flatten()
    top = decoding.top_k is not None and decoding.top_k < flat.shape[-1]
    step = len(flat) if top else max(1, VALUES_AT_ONCE // flat.shape[-1])
    parts = [_of_slice(flat[i : i + step], ids[i : i + step], decoding) for i in range(0, len(flat), max(1, step))]
    return torch.cat(parts or [flat.new_empty(0, dtype=torch.float64)]).view(wanted.shape)


def _of_slice(logits: Tensor, wanted: Tensor, decoding: Decoding) -> Tensor:
    """The same for [n, V] and [n]."""
    kept = _kept(logits, decoding)
    gold = logits.gather(-1, wanted[:, None])
    log_q = (gold.double() - kept.best).squeeze(-1) / decoding.temperature - kept.log_total
    if kept.counts is None:
        return log_q
    return log_q.masked_fill(_ranks(logits, wanted, kept.values, gold) >= kept.counts, -torch.inf)


class _Kept(NamedTuple):
    """What a scheme leaves of logits [n, V].

    Attributes:
        values: The logits among which all that can be drawn are, descending where any are left out.
        best: float64 [n, 1].
        log_total: float64 [n], of exp((logit - best) / temperature) over the tokens that can be drawn.
        counts: int64 [n], how many can be drawn; None for all.
    """

    values: Tensor
    best: Tensor
    log_total: Tensor
    counts: Tensor | None


def _kept(logits: Tensor, decoding: Decoding) -> _Kept:
    vocabulary = logits.shape[-1]
    k = min(decoding.top_k or vocabulary, vocabulary)
    nucleus = decoding.top_p < 1
    values = logits
    if k < vocabulary:
        values = top_values(logits, k)
    elif nucleus:
        values = logits.sort(dim=-1, descending=True).values
    best = values.amax(-1, keepdim=True).double()
    scaled = (values.double() - best) / decoding.temperature
    counts = None
    if k < vocabulary:
        counts = torch.full((len(logits),), k, device=logits.device)
    if nucleus:
        mass = scaled.softmax(-1).cumsum(-1)
        above = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
        within = above < decoding.top_p
        scaled = scaled.masked_fill(~within, -torch.inf)
        counts = within.sum(-1)
    return _Kept(values, best, scaled.exp().sum(-1).log(), counts)


def likeliest(logits: Tensor, count: int, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The tokens that are drawn most often, ties by the lowest token id, and logarithms of their probabilities.

    Args:
        logits: [n, V], finite or -inf.
        count: How many; at most V are given, and no more than ``top_k``.

    Returns:
        int64 [n, c] and float64 [n, c], descending; -inf for tokens that are never drawn.

    Example:
        >>> tokens, log_q = likeliest(torch.tensor([[0.2, 0.5, 0.3]]).log(), 2, Decoding(top_k=2))
        >>> tokens.tolist(), log_q.exp()
        ([[1, 2]], tensor([[0.6250, 0.3750]], dtype=torch.float64))
    """
    kept = _kept(logits, decoding)
    tokens = top_tokens(logits, min(count, kept.values.shape[-1]))
    log_q = (logits.gather(-1, tokens).double() - kept.best) / decoding.temperature - kept.log_total[:, None]
    if kept.counts is not None:
        ranks = torch.arange(tokens.shape[-1], device=logits.device)
        log_q = log_q.masked_fill(ranks >= kept.counts[:, None], -torch.inf)
    return tokens, log_q


def _ranks(logits: Tensor, wanted: Tensor, values: Tensor, gold: Tensor) -> Tensor:
    """Rank of each wanted token, from 0; k for those behind the k highest ``values``, which are sorted. int64 [n]."""
    rank = (values > gold).sum(-1)
    last = gold.squeeze(-1) == values[:, -1]
    tied = (last | ((values == gold).sum(-1) > 1)).nonzero().squeeze(-1)
    if len(tied):  # the order among equals is that of their ids
        lower = torch.arange(logits.shape[-1], device=logits.device) < wanted[tied, None]
        rank[tied] += ((logits[tied] == gold[tied]) & lower).sum(-1)
    return rank


def top_values(logits: Tensor, k: int) -> Tensor:
    """The k highest values of each row, descending.

    Those of a row lie in the k of about sqrt(V k) blocks whose maxima are highest, so few values are ever ranked.

    Args:
        logits: [n, V] with V >= k.

    Returns:
        [n, k].
    """
    size = math.isqrt(logits.shape[-1] // k)
    if size < 2:
        return logits.topk(k, dim=-1).values
    count = logits.shape[-1] // size
    blocks = logits[:, : size * count].unflatten(-1, (size, count))
    chosen = blocks.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = blocks.gather(2, chosen[:, None].expand(-1, size, -1)).flatten(1)
    return torch.cat([candidates, logits[:, size * count :]], dim=-1).topk(k, dim=-1).values


def extracted_in(log_p: Tensor, tries: float | Tensor) -> Tensor:
    """Probability 1 - (1 - p)^n that n independent draws give a sequence at least once.

    Args:
        log_p: float64, natural logarithm of the probability of one draw.
        tries: n, at least 1, or numbers to broadcast with ``log_p``.

    Returns:
        float64.

    Raises:
        InputError: Fewer tries than one.

    Example:
        >>> extracted_in(torch.tensor([0.5, 1e-30], dtype=torch.float64).log(), 2)
        tensor([7.5000e-01, 2.0000e-30], dtype=torch.float64)
    """
    if not bool((torch.as_tensor(tries) >= 1).all()):
        raise InputError(f"the number of tries is {tries}; it must be at least 1")
    return -torch.expm1(tries * torch.log1p(-log_p.double().exp()))


def expected_share(log_p: Tensor, tries: float) -> float:
    """Expected share of the sequences [n] that so many draws of each extract: mean(1 - (1 - p)^tries).

    Example:
        >>> expected_share(torch.tensor([0.5, 0.0], dtype=torch.float64).log(), 2)
        0.375
    """
    return extracted_in(log_p, tries).mean().item()


def reaches(log_p: Tensor, p: float) -> Tensor:
    """Whether the probability of one draw is p or more; what falls short by rounding alone reaches it.

    Raises:
        InputError: p lies outside (0, 1).
    """
    return log_p.double() >= math.log(_chance(p)) - SLACK


def tries_needed(log_p: Tensor, p: float) -> Tensor:
    """The n(p) of (n, p)-discoverable extraction: ceil(log1p(-p) / log1p(-p_z)) draws give a sequence with chance p.

    Returns:
        float64, whole numbers from 1; inf for what is never drawn.

    Raises:
        InputError: p lies outside (0, 1).

    Example:
        >>> tries_needed(torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=torch.float64).log(), 0.9)
        tensor([ 1.,  4., 22., inf], dtype=torch.float64)
    """
    tries = math.log1p(-_chance(p)) / torch.log1p(-log_p.double().exp())
    # A quotient of two roundings lies up to two units beside a whole number that it is.
    return (tries * (1 - 4 * torch.finfo(torch.float64).eps)).ceil().clamp(min=1)


def extraction_rates(log_p: Tensor, tries: list[float], chances: list[float]) -> Tensor:
    """Share of the sequences [n] that are (n, p)-discoverable: 1 - (1 - p_z)^n >= p.

    Args:
        tries: N values of n.
        chances: P values of p.

    Returns:
        float64 [N, P].

    Raises:
        InputError: A p lies outside (0, 1), or an n below 1.

    Example:
        >>> log_p = torch.tensor([0.5, 0.01], dtype=torch.float64).log()
        >>> extraction_rates(log_p, [1, 100], [0.1, 0.9])
        tensor([[0.5000, 0.0000],
                [1.0000, 0.5000]], dtype=torch.float64)
    """
    bounds = torch.tensor([_chance(p) for p in chances], dtype=torch.float64, device=log_p.device)
    n = torch.tensor(tries, dtype=torch.float64, device=log_p.device)
    found = extracted_in(log_p[:, None, None], n[:, None])
    return (found >= bounds * (1 - SLACK)).double().mean(0)


def prior_ratio(log_p: Tensor, log_prior: Tensor) -> Tensor:
    """How much likelier a sequence is behind its own prefix than behind an unrelated one (arXiv 2602.18733).

    Text that is merely easy is likely behind any prefix; text that is memorized is likely behind its own.

    Args:
        log_p, log_prior: float64 [n], natural logarithms of its probability behind either.

    Returns:
        float64 [n], natural logarithms; -inf for what is drawn behind neither.

    Example:
        >>> prior_ratio(torch.tensor([-1.0, -2.0]), torch.tensor([-9.0, -2.0]))
        tensor([8., 0.], dtype=torch.float64)
    """
    return torch.where(log_p == -math.inf, -math.inf, log_p.double() - log_prior.double())


def _chance(p: float) -> float:
    if not 0 < p < 1:
        raise InputError(f"the probability is {p}; it must lie between 0 and 1, both excluded")
    return p
