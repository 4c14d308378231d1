"""Does a model recite a suffix, and how likely is it drawn? One teacher-forced forward tells both.

Only what diverges is decoded.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.decoding import continue_greedily, greedy_continuations
from lightning_kfac.metrics.functional import Decoding, cut_after_end, log_probabilities, prior_ratio
from lightning_kfac.models.cached_rows import ReadRows, bears_gaps, read_rows
from lightning_kfac.models.tokens import left_padded, right_padded

# Most continuations that diverge do so within so many tokens; for them the rest of the suffix is not read.
FIRST = 8
# Two logits within so many units of the model's precision may change places with the order of summation.
NEAR_TIE = 8.0
POSITIONS_AT_ONCE = 1024


class Recital(NamedTuple):
    """How a model continues one prefix.

    Attributes:
        matched: Number of leading gold tokens that the greedy continuation repeats.
        strict: All of them.
        continuation: The greedy continuation; None where it was not asked for.
        near_tie: ``strict`` hangs on two logits that are equal within the model's precision: with another batch
            size, or decoded token by token, the verdict may be another.
        log_p: Natural logarithm of the probability that the gold is drawn; None where no decoding scheme was given.
    """

    matched: int
    strict: bool
    continuation: list[int] | None
    near_tie: bool
    log_p: float | None = None

    @property
    def decoded(self) -> list[int]:
        """The continuation; raises ``RuntimeError`` where it was not asked for."""
        if self.continuation is None:
            raise RuntimeError("the continuation was not decoded: ask recite for it with decode=True")
        return self.continuation


@torch.no_grad()
def recite(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    golds: Sequence[Sequence[int]],
    end_of_text: Collection[int] = frozenset(),
    decode: bool = True,
    decoding: Decoding | None = None,
) -> list[Recital]:
    """Compares the greedy continuation of each prefix with its gold suffix.

    The continuation repeats the first n gold tokens exactly when each of them is the argmax after the gold tokens
    before it. So the model reads prefix and suffix in one go, and a continuation that diverges is decoded from where
    it does, with the key-value cache of that forward. (Models with sliding windows decode it with a new one.)

    Args:
        prefixes: B non-empty lists of token ids.
        golds: B non-empty lists; each is cut after its first end-of-text token.
        end_of_text: Ids at which a continuation ends.
        decode: Also give the continuations. Without them sequences that diverge early cost their prefix only.
        decoding: Also tell how likely each gold is drawn so. What diverges is read on while it still can be drawn.

    Returns:
        B recitals.
    """
    if not prefixes:
        return []
    wanted = [list(cut_after_end(gold, end_of_text)) for gold in golds]
    reading = _Reading(model, prefixes, wanted, decoding=decoding)
    diverged = (reading.matched < reading.lengths).tolist()
    tails: dict[int, list[int]] = {}
    if decode:
        for some, numbers, rows in reading.groups:
            tails |= reading.tails(some[(reading.matched < reading.lengths)[some]], numbers, rows, end_of_text)
    matched = reading.matched.tolist()
    near = reading.near_ties.tolist()
    log_p = reading.log_p
    return [
        Recital(
            matched[i], not diverged[i], gold[: matched[i]] + tails.get(i, []) if decode else None, near[i], log_p[i]
        )
        for i, gold in enumerate(wanted)
    ]


def prior_ratios(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    unrelated: Sequence[Sequence[int]],
    golds: Sequence[Sequence[int]],
    decoding: Decoding,
    end_of_text: Collection[int] = frozenset(),
) -> list[float]:
    """How much likelier each gold is drawn behind its own prefix than behind an unrelated one.

    Args:
        prefixes, unrelated, golds: B lists of token ids each.
        decoding: One that leaves no token out, or most golds are never drawn behind an unrelated prefix.
        end_of_text: Each gold is cut after the first of these.

    Returns:
        B natural logarithms, see ``prior_ratio``.
    """
    own, other = (
        torch.tensor([r.log_p for r in recite(model, given, golds, end_of_text, False, decoding)], dtype=torch.float64)
        for given in (prefixes, unrelated)
    )
    return prior_ratio(own, other).tolist()


def gold_hits(model: nn.Module, prefixes: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> Tensor:
    """Which gold tokens are the argmax after the prefix and all gold tokens before them.

    Returns:
        bool [B, longest gold]; False behind the end of a gold.
    """
    reading = _Reading(model, prefixes, golds, first=None)
    return reading.hits


class _Reading:
    """A batch as the model reads it: the prefixes, and as much of the gold suffixes as is needed.

    Attributes:
        lengths: int64 [B], of the golds.
        predicted: int64 [B, L], the argmax before each gold token that was read.
        hits: bool [B, L], where it is the gold token.
        log_q: float64 [B, L], logarithm of the probability that a gold token is drawn; 0 where none was read or asked.
        matched: int64 [B], leading hits.
        groups: Numbers of rows, and where they were read last: numbers of all rows of a cache, and the cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        prefixes: Sequence[Sequence[int]],
        golds: Sequence[Sequence[int]],
        first: int | None = FIRST,
        decoding: Decoding | None = None,
    ):
        self.model = model
        self.prefixes = prefixes
        self.golds = golds
        self.decoding = decoding
        longest = max(len(prefix) + len(gold) for prefix, gold in zip(prefixes, golds, strict=True))
        self.rows = read_rows(model, len(prefixes), longest)
        device = self.rows.attend.device
        self.gold, self.real = right_padded(golds, device)
        self.lengths = self.real.sum(1)
        self.predicted = torch.full_like(self.gold, -1)
        self.close = torch.zeros_like(self.real)
        self.log_q = torch.zeros_like(self.gold, dtype=torch.float64)
        self.plain = bears_gaps(self.rows)
        last = self.gold.shape[1] - 1
        first = last if first is None or not self.plain else min(first, last)
        everyone = torch.arange(len(golds), device=device)
        self._read(self.rows, everyone, 0, first)
        self.groups = [(everyone, everyone, self.rows)]
        undecided = self.matched > first if decoding is None else self.log_q.isfinite().all(1)
        more = undecided & (self.lengths > first + 1)
        if more.any():
            rest = self.rows if more.all() else self.rows.take(everyone[more])
            self.groups = [(everyone[more], everyone[more], rest), (everyone[~more], everyone, self.rows)]
            self._read(rest, everyone[more], first + 1, last)

    @property
    def hits(self) -> Tensor:
        return (self.predicted == self.gold) & self.real

    @property
    def matched(self) -> Tensor:
        return self.hits.cumprod(1).sum(1)

    @property
    def log_p(self) -> list[float] | list[None]:
        """Of each row, rounded once, so that neither batch nor padding changes a bit of the sum."""
        if self.decoding is None:
            return [None] * len(self.golds)
        return [math.fsum(row) for row in self.log_q.tolist()]

    @property
    def near_ties(self) -> Tensor:
        """bool [B]: a close decision on the way to the verdict, or at the token that decided it."""
        matched = self.matched
        decisive = self.close.gather(1, matched.clamp(max=self.gold.shape[1] - 1)[:, None]).squeeze(1)
        return torch.where(matched < self.lengths, decisive, (self.close & self.real).any(1))

    def tails(
        self, some: Tensor, numbers: Tensor, rows: ReadRows, end_of_text: Collection[int]
    ) -> dict[int, list[int]]:
        """Continuations of some rows of a group from where they diverge, by number."""
        if not len(some):
            return {}
        matched = self.matched[some]
        left = self.lengths[some] - matched
        if self.plain:
            rows = rows if len(some) == len(numbers) else rows.take(torch.searchsorted(numbers, some))
            rows.forget_after(matched + torch.tensor([len(self.prefixes[i]) for i in some.tolist()]).to(matched))
            tails = continue_greedily(rows, self.predicted[some, matched], left, end_of_text)
        else:
            read = [
                [*self.prefixes[i], *self.golds[i][:m]] for i, m in zip(some.tolist(), matched.tolist(), strict=True)
            ]
            tails = greedy_continuations(self.model, read, left.tolist(), end_of_text)
        return dict(zip(some.tolist(), tails, strict=True))

    def _read(self, rows: ReadRows, numbers: Tensor, start: int, stop: int) -> None:
        """Reads what is needed to predict the gold tokens from ``start`` to ``stop``, both included."""
        gold = self.gold[numbers]
        real = self.real[numbers]
        if start == 0:
            prefix, there = left_padded(self.prefixes, gold.device)
            ids = torch.cat([prefix, gold[:, :stop]], 1)
            mask = torch.cat([there, real[:, :stop]], 1)
        else:
            ids = gold[:, start - 1 : stop]
            mask = real[:, start - 1 : stop]
        logits = rows.read(ids, mask, stop - start + 1)
        epsilon = torch.finfo(next(self.model.parameters()).dtype).eps
        step = max(1, POSITIONS_AT_ONCE // logits.shape[1])
        for part in torch.arange(len(numbers), device=gold.device).split(step):
            wide = logits[part] if logits.dtype == torch.float64 else logits[part].float()
            wanted = gold[part, start : stop + 1, None]
            best, token = wide.max(-1)  # ties to the lowest id
            if not best.isfinite().all():
                raise InputError(
                    "the model's logits are not finite: its weights are damaged, or overflow in this dtype"
                )
            of_gold = wide.gather(-1, wanted).squeeze(-1)
            of_others = wide.scatter(-1, wanted, -torch.inf).amax(-1)
            self.predicted[numbers[part], start : stop + 1] = token
            close = (of_gold - of_others).abs() <= NEAR_TIE * epsilon * best.abs()
            self.close[numbers[part], start : stop + 1] = close
            if self.decoding is not None:
                log_q = log_probabilities(wide, wanted.squeeze(-1), self.decoding)
                self.log_q[numbers[part], start : stop + 1] = log_q.masked_fill(~real[part, start : stop + 1], 0)
