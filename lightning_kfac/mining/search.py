"""Which windows of some pieces does a model recite?"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.recitation import Recital, recite
from lightning_kfac.metrics.functional import cut_after_end
from lightning_kfac.mining.scores import Scores
from lightning_kfac.mining.windows import Piece
from lightning_kfac.models.banded import banded_argmax
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
    bulk: BulkShare | None = None,
    least_bulk: float = 0.0,
    scores: Scores | None = None,
) -> Searched:
    """Finds the windows whose suffix the model recites word for word from exactly their prefix.

    Args:
        likely: One forward over each piece predicts every token of it; only windows of whose suffix it predicts at
            least this share are checked by themselves. Each token attends to as many tokens before it as the middle
            of a suffix sees, where the model takes such a mask. None checks every window.
        batch_size: Windows checked at once.
        max_positions: Longest row that the model takes.
        bulk, least_bulk: Instead of ``likely``: the same forward tells of each suffix which share lies in the flat
            directions of layers; only windows with at least this share are checked.
        scores: Takes how likely each window is drawn, in the order of pieces and windows; those that are not checked
            are entered as not measured.
    """
    windows = [(i, offset) for i, piece in enumerate(pieces) for offset in piece.offsets.tolist()]
    # A text that ends within a window is no recitation of the window.
    ends = [np.isin(piece.tokens, list(end_of_text)).cumsum() for piece in pieces]
    length = prefix_len + suffix_len
    chosen = [(i, o) for i, o in windows if ends[i][o + length - 1] == (ends[i][o - 1] if o else 0)]
    if chosen:
        chosen = _filtered(model, pieces, chosen, (prefix_len, suffix_len), likely, bulk, least_bulk)
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


def _filtered(
    model: nn.Module,
    pieces: Sequence[Piece],
    windows: list[tuple[int, int]],
    window: tuple[int, int],
    likely: float | None,
    bulk: BulkShare | None,
    least_bulk: float,
) -> list[tuple[int, int]]:
    """The windows to check by themselves, of those [(piece, offset)]; see ``search``."""
    prefix_len, suffix_len = window
    again = {(i, offset) for i, piece in enumerate(pieces) for offset in piece.offsets[piece.again].tolist()}
    context = prefix_len + suffix_len // 2
    if bulk is not None:
        stretches = [(i, o + prefix_len - 1, suffix_len) for i, o in windows]
        shares = bulk.of_stretches(_batch(model, pieces), stretches, context)
        return [w for w, share in zip(windows, shares, strict=True) if share >= least_bulk or w in again]
    if likely is None:
        return windows
    hits = _hits(model, pieces, context, prefix_len)
    end = prefix_len + suffix_len
    least = likely * suffix_len
    return [(i, o) for i, o in windows if hits[i, o + end] - hits[i, o + prefix_len] >= least or (i, o) in again]


def _hits(model: nn.Module, pieces: Sequence[Piece], context: int, first: int) -> np.ndarray:
    """Running count of predicted tokens before each place of each piece, from the first on. int64 [B, T + 1]."""
    batch = _batch(model, pieces)
    ids, _ = right_padded([piece.tokens.tolist() for piece in pieces], batch.input_ids.device)
    right = banded_argmax(model, batch, context, first - 1)[:, : ids.shape[1] - 1] == ids[:, 1:]
    return torch.cat([ids.new_zeros(len(ids), 2), right.long().cumsum(1)], dim=1).cpu().numpy()


def _batch(model: nn.Module, pieces: Sequence[Piece]) -> TokenBatch:
    ids, real = right_padded([piece.tokens.tolist() for piece in pieces], next(model.parameters()).device)
    return TokenBatch.from_dict({"input_ids": ids} | ({} if real.all() else {"attention_mask": real}))


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
