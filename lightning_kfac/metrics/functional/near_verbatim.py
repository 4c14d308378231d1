"""How likely a sample comes close to a sequence: a lower bound from the continuations that a beam search finds.

A draw of as many tokens as the sequence has, or to an end of text before that, has many outcomes; no two of them
happen at once, so probabilities of different ones add up. What no beam came to is left out of the sum, which is why it
is a lower bound (arXiv 2603.24917).
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError

# What the model draws next behind some beams [n]: tokens int64 [n, c] and logarithms of their probabilities [n, c].
Draws = tuple[Tensor, Tensor]


class Beams(NamedTuple):
    """W beginnings of continuations of each of B sequences.

    Attributes:
        log_p: float64 [B, W]; -inf where there is none.
        edits: int64 [B, W, L + 1], distance to each beginning of the sequence, from the empty one on.
        exact: bool [B, W], whether it is the beginning of the sequence itself.
    """

    log_p: Tensor
    edits: Tensor
    exact: Tensor


def log_near_verbatim(
    draws: Draws,
    step: Callable[[Tensor, Tensor, Tensor], Draws],
    golds: Sequence[Sequence[int]],
    log_p: Tensor,
    distance: int,
    width: int,
    end_of_text: Collection[int] = frozenset(),
) -> Tensor:
    """Lower bounds of the probabilities that samples lie within some token edits of their sequences.

    Beams that cannot come that close any more are dropped, and the sequence's own is never dropped. Exact where no
    other is, because the beams are many enough.

    Args:
        draws: Of each prefix, [B, c].
        step: Given int64 [B * W] numbers of beams, counted through all sequences, the tokens that they go on with, and
            whether anybody goes on with them (bool [B * W]): what is drawn next, [B * W, c].
        golds: B lists of token ids, cut after their end of text.
        log_p: float64 [B], of the sequences themselves.
        distance: Most edits: insertions, deletions, replacements.
        width: Beams of each sequence.
        end_of_text: Ids at which a continuation ends.

    Returns:
        float64 [B], natural logarithms: at least ``log_p``, at most 0.
    """
    check_near_verbatim(distance, width)
    device = log_p.device
    lengths = torch.tensor([len(gold) for gold in golds], device=device)
    gold = torch.full((len(golds), int(lengths.max())), -1, device=device)
    for number, ids in enumerate(golds):
        gold[number, : len(ids)] = torch.tensor(list(ids), device=device)
    stop = torch.tensor(sorted(end_of_text), dtype=torch.long, device=device)
    edits = torch.arange(gold.shape[1] + 1, device=device).expand(len(golds), 1, -1)
    beams = Beams(log_p.new_zeros(len(golds), 1), edits, torch.ones(len(golds), 1, dtype=torch.bool, device=device))
    found = [log_p[:, None]]
    for place in range(gold.shape[1]):
        tokens, log_q = (part.view(*beams.log_p.shape, -1) for part in draws)
        grown = _grown(beams, tokens, log_q, gold, place)
        ends = torch.isin(tokens, stop) | (lengths == place + 1)[:, None, None]
        last = lengths[:, None, None, None].expand(*tokens.shape, 1)
        near = ends & (grown.edits.gather(-1, last).squeeze(-1) <= distance) & ~grown.exact
        found.append(grown.log_p.masked_fill(~near, -torch.inf).flatten(1))
        within = torch.arange(gold.shape[1] + 1, device=device) <= lengths[:, None, None, None]
        reachable = grown.edits.masked_fill(~within, distance + 1).amin(-1) <= distance
        score = grown.log_p.masked_fill(ends | ~reachable, -torch.inf)
        if place + 1 == gold.shape[1] or not score.isfinite().any():
            break
        beams, parents = _best(grown, score, width)
        first = torch.arange(len(golds), device=device)[:, None] * tokens.shape[1]
        chosen = tokens.flatten(1).gather(1, parents)
        draws = step((first + parents // tokens.shape[2]).flatten(), chosen.flatten(), beams.log_p.isfinite().flatten())
    return torch.cat(found, dim=1).logsumexp(1).clamp(max=0)


def check_near_verbatim(distance: int, width: int) -> None:
    """Raises ``InputError`` where there is nothing to look for, or nothing to look with."""
    if distance < 1:
        raise InputError(f"extraction.near_verbatim is {distance}; it must be at least 1 edit, or 0 to leave it out")
    if width < 1:
        raise InputError(f"extraction.beams is {width}; it must be at least 1")


def next_edits(edits: Tensor, tokens: Tensor, gold: Tensor) -> Tensor:
    """Edit distances to each beginning of a sequence, after one more token (Wagner and Fischer, 1974).

    Args:
        edits: int64 [..., L + 1], before it.
        tokens: int64 [...].
        gold: int64 [..., L], the sequence.

    Example:
        >>> gold = torch.tensor([7, 8])
        >>> one = next_edits(torch.arange(3), torch.tensor(8), gold)
        >>> one, next_edits(one, torch.tensor(8), gold)
        (tensor([1, 1, 1]), tensor([2, 2, 1]))
    """
    replaced = edits[..., :-1] + (gold != tokens[..., None])
    best = torch.minimum(edits[..., 1:] + 1, replaced)
    best = torch.cat([(edits[..., :1] + 1).expand_as(best[..., :1]), best], dim=-1)
    # What the sequence has more: the least over all shorter beginnings of their distance and what lacks.
    places = torch.arange(best.shape[-1], device=best.device)
    return (best - places).cummin(-1).values + places


def _grown(beams: Beams, tokens: Tensor, log_q: Tensor, gold: Tensor, place: int) -> Beams:
    """Every beam with every token that may follow: [B, W, c]."""
    edits = next_edits(beams.edits[:, :, None], tokens, gold[:, None, None])
    exact = beams.exact[:, :, None] & (tokens == gold[:, place, None, None])
    return Beams(beams.log_p[:, :, None] + log_q, edits, exact)


def _best(grown: Beams, score: Tensor, width: int) -> tuple[Beams, Tensor]:
    """The likeliest beams, the sequence's own among them, and their numbers among all that have grown. int64 [B, W]."""
    flat = score.flatten(1)
    ranked = torch.where(grown.exact.flatten(1) & flat.isfinite(), torch.inf, flat)
    numbers = ranked.topk(min(width, flat.shape[1]), dim=1).indices
    edits = grown.edits.flatten(1, 2)
    chosen = edits.gather(1, numbers[:, :, None].expand(-1, -1, edits.shape[-1]))
    return Beams(flat.gather(1, numbers), chosen, grown.exact.flatten(1).gather(1, numbers)), numbers
