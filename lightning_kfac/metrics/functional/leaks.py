"""What a model gives away of one text: the scores by which membership tests tell trained texts from others.

All come from one teacher-forced forward over the text: of each token its log-probability, the mean and the deviation of
log-probabilities over the vocabulary there, and whether it was the likeliest.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# Of float64 logits.
VALUES_AT_ONCE = 1 << 22
# A share of tokens that is whole but for rounding is whole.
SLACK = 1e-9


@dataclass(frozen=True)
class Leaks:
    """How members are told from non-members (``data.members``, ``data.nonmembers``).

    Args:
        k: Share of a text's tokens, the least likely, that Min-K and Min-K++ look at.
        reference: Folder or hub name of a model with the same tokenizer that did not see the members; the losses of
            both are compared. By default that is left out.
    """

    k: float = 0.2
    reference: str | None = None

    def __post_init__(self) -> None:
        _check_share(self.k)


class TokenStatistics(NamedTuple):
    """What a model says of each token of a text, given those before it.

    Attributes:
        log_p: float64 [...], natural logarithm of its probability.
        mean: float64 [...], mean of log p over the vocabulary, each token weighted by its probability p.
        deviation: float64 [...], standard deviation of the same.
        hit: bool [...], whether it is the likeliest; of equal ones the lowest id is.
    """

    log_p: Tensor
    mean: Tensor
    deviation: Tensor
    hit: Tensor


def token_statistics(logits: Tensor, wanted: Tensor) -> TokenStatistics:
    """What a model says of tokens.

    Args:
        logits: [..., V], finite or -inf, not all -inf.
        wanted: int64 [...], token ids.

    Example:
        >>> logits = torch.tensor([0.5, 0.25, 0.25]).log()
        >>> found = token_statistics(logits, torch.tensor(1))
        >>> round(found.log_p.exp().item(), 6), found.hit.item()
        (0.25, False)
    """
    flat = logits.reshape(-1, logits.shape[-1])
    ids = wanted.flatten()
    step = max(1, VALUES_AT_ONCE // flat.shape[-1])
    parts = [_of_slice(flat[i : i + step], ids[i : i + step]) for i in range(0, len(flat), step)]
    if not parts:
        empty = flat.new_empty(wanted.shape, dtype=torch.float64)
        return TokenStatistics(empty, empty, empty, empty.bool())
    return TokenStatistics(*(torch.cat(columns).view(wanted.shape) for columns in zip(*parts, strict=True)))


def _of_slice(logits: Tensor, wanted: Tensor) -> TokenStatistics:
    """The same for [n, V] and [n]."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    never = p == 0  # adds nothing, where 0 times infinity would be no number
    mean = (p * log_p).masked_fill(never, 0).sum(-1)
    variance = (p * (log_p - mean[:, None]).square()).masked_fill(never, 0).sum(-1)
    of_wanted = log_p.gather(-1, wanted[:, None]).squeeze(-1)
    return TokenStatistics(of_wanted, mean, variance.sqrt(), logits.argmax(-1) == wanted)


def mean_loss(log_p: Tensor) -> float:
    """Mean loss a token, in nats; members have a lower one (Yeom et al., 2018).

    Args:
        log_p: float64 [L].

    Raises:
        InputError: There is no token.

    Example:
        >>> mean_loss(torch.tensor([-1.0, -3.0]))
        2.0
    """
    _check(log_p)
    return -log_p.mean().item()


def zlib_ratio(loss: float, text: str) -> float:
    """Mean loss over the length of the text when zlib has compressed it (Carlini et al., arXiv 2012.07805).

    A text that repeats itself is likely without having been seen; it is also short when compressed.

    Args:
        loss: In nats a token.
        text: What was scored.

    Returns:
        Nats a token and compressed byte.

    Example:
        >>> zlib_ratio(2.2, "abc") == 2.2 / 11
        True
    """
    return loss / len(zlib.compress(text.encode("utf-8", "surrogatepass")))


def reference_ratio(loss: float, reference_loss: float) -> float:
    """Logarithm of the ratio of two models' perplexities: the loss less that of a model that did not see the text.

    Members have a lower one (Carlini et al., arXiv 2012.07805; Mireshghallah et al., arXiv 2203.03929).

    Args:
        loss, reference_loss: In nats a token, of the same tokens.

    Example:
        >>> reference_ratio(1.5, 3.5)
        -2.0
    """
    return loss - reference_loss


def min_k(log_p: Tensor, k: float = 0.2) -> float:
    """Min-K %: mean log-probability of the least likely tokens (Shi et al., arXiv 2310.16789); higher for members.

    Args:
        log_p: float64 [L].
        k: Share of the tokens; rounded down to whole tokens, and at least one.

    Raises:
        InputError: There is no token, or k lies outside (0, 1].

    Example:
        >>> min_k(torch.tensor([-1.0, -5.0, -2.0, -3.0]), 0.5)
        -4.0
    """
    _check(log_p)
    return log_p.sort().values[: _count(len(log_p), k)].mean().item()


def min_k_plus_plus(log_p: Tensor, mean: Tensor, deviation: Tensor, k: float = 0.2) -> float:
    """Min-K++: the same of (log p - mean) / deviation over the vocabulary (Zhang et al., arXiv 2404.02936).

    Where the model is certain, so that the deviation is 0, the token that it expects has 0.

    Args:
        log_p, mean, deviation: float64 [L], see ``TokenStatistics``.
        k: Share of the tokens.

    Raises:
        InputError: There is no token, or k lies outside (0, 1].

    Example:
        >>> log_p = torch.tensor([-1.0, -5.0])
        >>> min_k_plus_plus(log_p, torch.tensor([-2.0, -3.0]), torch.tensor([1.0, 2.0]), 0.5)
        -1.0
    """
    _check(log_p)
    return min_k(((log_p - mean) / deviation).nan_to_num(0.0, torch.inf, -torch.inf), k)


def exact_match(hit: Tensor) -> float:
    """Share of the tokens that are the likeliest, given the right ones before them (EM, Tirumala et al., 2205.10770).

    Args:
        hit: bool [L].

    Raises:
        InputError: There is no token.

    Example:
        >>> exact_match(torch.tensor([True, False, True, True]))
        0.75
    """
    _check(hit)
    return hit.double().mean().item()


def extraction_strength(hit: Tensor) -> float:
    """1 - k / L with k the fewest tokens to give before the rest is recited (ES, Carlini et al., arXiv 2012.07805).

    The rest is recited when each of its tokens is the likeliest, so L - k counts the hits at the end.

    Args:
        hit: bool [L].

    Raises:
        InputError: There is no token.

    Example:
        >>> extraction_strength(torch.tensor([True, False, True, True]))
        0.5
    """
    _check(hit)
    return hit.flip(0).long().cumprod(0).double().mean().item()


def _check(tokens: Tensor) -> None:
    if not len(tokens):
        raise InputError("a text without a token cannot be scored")


def _count(length: int, k: float) -> int:
    """So many of ``length`` tokens are the share k of them."""
    _check_share(k)
    return max(1, int(length * k + SLACK))


def _check_share(k: float) -> None:
    if not 0 < k <= 1:
        raise InputError(f"leaks.k is {k}; it must be greater than 0, and at most 1")
