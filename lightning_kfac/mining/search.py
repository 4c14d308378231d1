"""Which windows of some pieces does a model recite?"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_kfac.evaluation.recitation import Recital, recite
from lightning_kfac.evaluation.scoring import most_likely
from lightning_kfac.metrics.functional import cut_after_end
from lightning_kfac.mining.scores import Scores
from lightning_kfac.mining.windows import Piece
from lightning_kfac.models.tokens import TokenBatch, right_padded


class Found(NamedTuple):
    """A recited window.

    Attributes:
        document, offset: Where it begins, in tokens of the document.
        match_length: Tokens behind the prefix that the model recites, beyond the window's end too.
    """

    document: int
    offset: int
    match_length: int
    prefix_ids: list[int]
    suffix_ids: list[int]


class Searched(NamedTuple):
    """What a search came to: recited windows, windows looked at, windows checked by themselves, near ties."""

    found: list[Found]
    windows: int
    checked: int
    near_ties: int


class Looked(NamedTuple):
    """A batch of pieces: what a search came to, and how likely each window is drawn, where that was asked for."""

    searched: Searched
    scores: Scores | None


def search(
    model: nn.Module,
    pieces: Sequence[Piece],
    prefix_len: int,
    suffix_len: int,
    *,
    likely: float | None,
    batch_size: int,
    end_of_text: Collection[int] = frozenset(),
    max_positions: int | None = None,
    scores: Scores | None = None,
) -> Searched:
    """Finds the windows whose suffix the model recites word for word from exactly their prefix.

    Args:
        likely: One forward over each piece predicts every token of it; only windows of whose suffix it predicts at
            least this share are checked by themselves. Each token attends to as many tokens before it as the middle
            of a suffix sees, where the model takes such a mask. None checks every window.
        batch_size: Windows checked at once.
        max_positions: Longest row that the model takes.
        scores: Takes how likely each window is drawn, in the order of pieces and windows; those that are not checked
            are entered as not measured.
    """
    windows = [(i, offset) for i, piece in enumerate(pieces) for offset in piece.offsets.tolist()]
    # A text that ends within a window is no recitation of the window.
    ends = [np.isin(piece.tokens, list(end_of_text)).cumsum() for piece in pieces]
    length = prefix_len + suffix_len
    again = {(i, offset) for i, piece in enumerate(pieces) for offset in piece.offsets[piece.again].tolist()}
    chosen = [(i, o) for i, o in windows if ends[i][o + length - 1] == (ends[i][o - 1] if o else 0)]
    if likely is not None and chosen:
        hits = _hits(model, pieces, prefix_len + suffix_len // 2)
        chosen = [
            (i, o)
            for i, o in chosen
            if hits[i, o + length] - hits[i, o + prefix_len] >= likely * suffix_len or (i, o) in again
        ]
    decoding = None if scores is None else scores.decoding
    found = []
    measured: dict[tuple[int, int], Recital] = {}
    near_ties = 0
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        texts = [pieces[i].tokens[offset : offset + prefix_len + suffix_len].tolist() for i, offset in part]
        prefixes = [ids[:prefix_len] for ids in texts]
        golds = [ids[prefix_len:] for ids in texts]
        recitals = recite(model, prefixes, golds, end_of_text, decode=False, decoding=decoding)
        measured |= zip(part, recitals, strict=True)
        near_ties += sum(recital.near_tie for recital in recitals)
        for (i, offset), prefix, gold, recital in zip(part, prefixes, golds, recitals, strict=True):
            if recital.strict:
                after = [*pieces[i].tokens[offset + prefix_len :].tolist(), *pieces[i].following[:1024].tolist()]
                longest = min(len(after), (max_positions or math.inf) - prefix_len)
                length = _match_length(model, prefix, after[: int(longest)], suffix_len, end_of_text)
                found.append(Found(pieces[i].document, pieces[i].start + offset, length, prefix, gold))
    if scores is not None:
        for i, offset in windows:
            told = measured.get((i, offset))
            scores.add(pieces[i].document, pieces[i].start + offset, told and told.log_p, told and told.strict)
    return Searched(found, len(windows), len(chosen), near_ties)


def _hits(model: nn.Module, pieces: Sequence[Piece], context: int) -> np.ndarray:
    """Running count of predicted tokens before each place of each piece. int64 [B, T + 1]."""
    device = next(model.parameters()).device
    ids, real = right_padded([piece.tokens.tolist() for piece in pieces], device)
    batch = TokenBatch.from_dict({"input_ids": ids} | ({} if real.all() else {"attention_mask": real}))
    right = most_likely(model, batch, context)[:, : ids.shape[1] - 1] == ids[:, 1:]
    return torch.cat([ids.new_zeros(len(ids), 2), right.long().cumsum(1)], dim=1).cpu().numpy()


def _match_length(
    model: nn.Module, prefix: list[int], after: list[int], known: int, end_of_text: Collection[int]
) -> int:
    """How much of the text behind the prefix the model recites; at least ``known`` tokens."""
    after = list(cut_after_end(after, end_of_text))
    while known < len(after):
        wanted = min(2 * known, len(after))
        (recital,) = recite(model, [prefix], [after[:wanted]], end_of_text, decode=False)
        if not recital.strict:
            return max(known, recital.matched)
        known = wanted
    return known
