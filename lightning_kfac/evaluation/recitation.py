"""Does a model recite a suffix, and how likely is it drawn? One teacher-forced forward tells both.

Only what diverges is decoded.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.decoding import continue_greedily, greedy_continuations
from lightning_kfac.metrics.functional import Decoding, cut_after_end, log_probabilities, prior_ratio
from lightning_kfac.models.cached_rows import ReadRows, RereadRows, bears_gaps, read_rows
from lightning_kfac.models.tokens import left_padded, right_padded

# A suffix is read in parts that end before these tokens: most continuations that diverge do so at once, or soon.
CUTS = (0, 8)
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
    if not decode:
        return _Reading(model, prefixes, golds, end_of_text, decoding=decoding).recitals()
    recitation = Recitation(model, end_of_text, decoding)
    (recitals,) = [*recitation.add(prefixes, golds), *recitation.finish()]
    return recitals


class Recitation:
    """Sequences that are recited batch after batch, with their continuations.

    What diverges waits, with the key-value cache of what was read, until there is a full batch of it: to decode few
    rows takes almost as long as to decode many. So memory holds the caches of fewer rows than the largest batch has,
    beside those of the batch that is read, and fewer than twice as many are decoded together.

    Args:
        model, end_of_text, decoding: As of ``recite``.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> recitation = Recitation(load_model("demo"))
        >>> early = recitation.add([[5, 6], [7]], [[8, 9], [3]])
        >>> [len(recitals) for recitals in [*early, *recitation.finish()]]
        [2]
    """

    def __init__(self, model: nn.Module, end_of_text: Collection[int] = frozenset(), decoding: Decoding | None = None):
        self.model = model
        self.end_of_text = end_of_text
        self.decoding = decoding
        self._largest = 1
        self._batches: deque[list[Recital]] = deque()
        self._waiting: list[_Diverged] = []
        self._rows: ReadRows | None = None  # of all that wait; None where they are read anew

    @torch.no_grad()
    def add(self, prefixes: Sequence[Sequence[int]], golds: Sequence[Sequence[int]]) -> list[list[Recital]]:
        """Reads a batch.

        Args:
            prefixes, golds: B lists each, as of ``recite``.

        Returns:
            The batches that are complete now and were not given back yet, in the order in which they came.
        """
        self._largest = max(self._largest, len(prefixes))
        recitals: list[Recital] = []
        self._batches.append(recitals)
        if prefixes:
            reading = _Reading(self.model, prefixes, golds, self.end_of_text, decoding=self.decoding, keep=True)
            recitals += reading.recitals()
            self._wait(recitals, reading)
        if len(self._waiting) >= self._largest:
            self._decode()
        return self._complete()

    @torch.no_grad()
    def finish(self) -> list[list[Recital]]:
        """Decodes what waits; returns the batches that are left."""
        self._decode()
        return self._complete()

    def _wait(self, recitals: list[Recital], reading: "_Reading") -> None:
        """Fills in the continuations that are known; the others wait."""
        numbers, parts = reading.diverged()
        for i in set(range(len(recitals))) - set(numbers):
            recitals[i] = recitals[i]._replace(continuation=reading.golds[i])
        if not numbers:
            return
        kind = type(parts[0]) if parts else type(None)
        if self._waiting and type(self._rows) is not kind:
            self._decode()
        rows = ([] if self._rows is None else [self._rows]) + parts
        self._rows = rows[0].joined(rows[1:]) if rows else None
        predicted = reading.predicted.tolist()
        for i in numbers:
            known = reading.golds[i][: recitals[i].matched]
            left = len(reading.golds[i]) - len(known)
            first = predicted[i][len(known)]
            self._waiting.append(_Diverged(recitals, i, list(reading.prefixes[i]), known, first, left))

    def _decode(self) -> None:
        """Decodes all that waits."""
        waiting, self._waiting = self._waiting, []
        rows, self._rows = self._rows, None
        left = [one.left for one in waiting]
        if rows is None:
            read = [one.prefix + one.known for one in waiting]
            tails = greedy_continuations(self.model, read, left, self.end_of_text)
        else:
            first = torch.tensor([one.first for one in waiting], device=rows.attend.device)
            tails = continue_greedily(rows, first, torch.tensor(left), self.end_of_text)
        for one, tail in zip(waiting, tails, strict=True):
            one.recitals[one.number] = one.recitals[one.number]._replace(continuation=one.known + tail)

    def _complete(self) -> list[list[Recital]]:
        complete = []
        while self._batches and all(recital.continuation is not None for recital in self._batches[0]):
            complete.append(self._batches.popleft())
        return complete


class _Diverged(NamedTuple):
    """A sequence that waits to be decoded.

    Attributes:
        recitals, number: Where its recital stands.
        known: Gold tokens that the continuation repeats.
        first: The token behind them.
        left: How many tokens the continuation lacks, that one included.
    """

    recitals: list[Recital]
    number: int
    prefix: list[int]
    known: list[int]
    first: int
    left: int


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
    return _Reading(model, prefixes, golds, whole=True).hits


class _Reading:
    """A batch as the model reads it: the prefixes, and as much of the gold suffixes as is needed.

    Attributes:
        golds: B lists, each cut after its first end of text.
        lengths: int64 [B], of the golds.
        predicted: int64 [B, L], the argmax before each gold token that was read.
        hits: bool [B, L], where it is the gold token.
        log_q: float64 [B, L], logarithm of the probability that a gold token is drawn; 0 where none was read or asked.
        matched: int64 [B], leading hits.
        groups: Of rows that were read equally far: their numbers, and where they were read last: numbers of all rows
            of a cache, and the cache. Empty unless they are to be kept.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        prefixes: Sequence[Sequence[int]],
        golds: Sequence[Sequence[int]],
        end_of_text: Collection[int] = frozenset(),
        decoding: Decoding | None = None,
        whole: bool = False,
        keep: bool = False,
    ):
        self.model = model
        self.prefixes = prefixes
        self.golds = [list(cut_after_end(gold, end_of_text)) for gold in golds]
        self.decoding = decoding
        longest = max(len(prefix) + len(gold) for prefix, gold in zip(prefixes, self.golds, strict=True))
        rows = read_rows(model, len(prefixes), longest)
        device = rows.attend.device
        self.gold, self.real = right_padded(self.golds, device)
        self.lengths = self.real.sum(1)
        self.predicted = torch.full_like(self.gold, -1)
        self.close = torch.zeros_like(self.real)
        self.log_q = torch.zeros_like(self.gold, dtype=torch.float64)
        self.plain = bears_gaps(rows)
        self.groups: list[tuple[Tensor, Tensor, ReadRows]] = []
        last = self.gold.shape[1] - 1
        cuts = [cut for cut in CUTS if cut < last] if self.plain and not whole else []
        if isinstance(rows, RereadRows):
            cuts = cuts[-1:]  # each part costs the prefix again
        numbers = torch.arange(len(golds), device=device)
        start = 0
        for stop in (*cuts, last):
            self._read(rows, numbers, start, stop)
            start = stop + 1
            more = self._undecided(start)[numbers]
            if keep and not more.all():
                self.groups.append((numbers[~more], numbers, rows))
            if not more.any():
                break
            if not more.all():
                rows = rows.take(more.nonzero()[:, 0])
                numbers = numbers[more]

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

    def recitals(self) -> list[Recital]:
        """What is known without decoding."""
        matched = self.matched
        strict = (matched == self.lengths).tolist()
        found = zip(matched.tolist(), strict, self.near_ties.tolist(), self.log_p, strict=True)
        return [Recital(n, verdict, None, near, log_p) for n, verdict, near, log_p in found]

    def diverged(self) -> tuple[list[int], list[ReadRows]]:
        """Numbers of the rows whose continuation diverges; and the same rows, of which the model has read no more than
        the gold tokens before that. These are left out where the model must read them anew.
        """
        matched = self.matched
        numbers: list[int] = []
        parts: list[ReadRows] = []
        for some, everyone, rows in self.groups:
            some = some[(matched < self.lengths)[some]]
            if not len(some):
                continue
            numbers += some.tolist()
            if self.plain:
                taken = rows if len(some) == len(everyone) else rows.take(torch.searchsorted(everyone, some))
                before = torch.tensor([len(self.prefixes[i]) for i in some.tolist()], device=some.device)
                taken.forget_after(before + matched[some])
                parts.append(taken)
        return numbers, parts

    def _undecided(self, read: int) -> Tensor:
        """bool [B]: rows with more tokens than were read, whose verdict or probability hangs on the others."""
        open_still = self.matched >= read if self.decoding is None else self.log_q.isfinite().all(1)
        return open_still & (self.lengths > read)

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
