"""The windows of a corpus, and the pieces of documents that hold them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.tokenized import TokenizedText
from lightning_kfac.errors import InputError


@dataclass(frozen=True)
class Mining:
    """How ``predict`` looks for recited windows.

    Args:
        stride: Tokens from one window to the next.
        exhaustive: Check every window by itself, instead of those only that one long forward finds likely.
        likely: Share of a suffix that the long forward must predict for its window to be checked. Higher is faster and
            misses more.
        near_duplicate: Windows whose 5-grams of tokens overlap by this much (Jaccard) with one found earlier are
            left out.
        low_entropy: Suffixes below this entropy of their tokens, in bits, are reported apart as repetitions.
        before: Folder of an earlier search of the same corpus with another model, such as the unedited one: what it
            measured is measured again, and drawn above.
    """

    stride: int = 16
    exhaustive: bool = False
    likely: float = 0.4
    near_duplicate: float = 0.7
    low_entropy: float = 2.0
    before: str | None = None

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise InputError(f"mining.stride is {self.stride}; it must be at least 1")
        for name in ("likely", "near_duplicate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"mining.{name} is {getattr(self, name)}; it must lie between 0 and 1")


def check_window(seq_len: int, length: int) -> None:
    """Raises ``InputError`` where a row is shorter than a window."""
    if seq_len < length:
        raise InputError(f"data.seq_len is {seq_len}, less than a window of {length} tokens")


class Piece(NamedTuple):
    """A stretch of a document with the windows that begin in it.

    Attributes:
        document: Number of the document in the corpus.
        start: Its first token's place in the document.
        tokens: int32 [n], to the end of the last window.
        following: int32, what the document holds behind it.
        offsets: int64, places of the windows in ``tokens``.
        again: bool, which of them are checked in any case.
    """

    document: int
    start: int
    tokens: np.ndarray
    following: np.ndarray
    offsets: np.ndarray
    again: np.ndarray


class MiningPieces(Dataset[Piece]):
    """All pieces of a corpus, the longest first.

    Windows lie within a document, at multiples of the stride from its beginning; its end-of-text token is no part of
    it. A piece holds as many windows as ``seq_len`` tokens do.

    Args:
        text: The corpus.
        length: Tokens of a window.
        stride: Tokens from one window to the next.
        seq_len: Tokens of the longest piece.
    """

    def __init__(self, text: TokenizedText, length: int, stride: int, seq_len: int):
        check_window(seq_len, length)
        self.text = text
        self.length = length
        self.stride = stride
        self.starts = np.append(0, text.ends[:-1])
        sizes = text.ends - self.starts - 1
        windows = np.maximum(0, (sizes - length) // stride + 1)
        at_once = (seq_len - length) // stride + 1
        pieces = -(-windows // at_once)
        self.document = np.repeat(np.arange(len(sizes)), pieces)
        # Of each document the windows before it, and all.
        self.windows_before = np.append(0, windows.cumsum())
        self.again = np.zeros(self.windows_before[-1], dtype=bool)
        number = np.arange(len(self.document)) - np.repeat(pieces.cumsum() - pieces, pieces)
        self.first_window = number * at_once
        self.n_windows = np.minimum(at_once, windows[self.document] - self.first_window)
        order = np.argsort(-self.n_windows, kind="stable")
        self.document = self.document[order]
        self.first_window = self.first_window[order]
        self.n_windows = self.n_windows[order]
        self.skipped_documents = int((windows == 0).sum())

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, number: int) -> Piece:
        document = int(self.document[number])
        count = int(self.n_windows[number])
        start = int(self.first_window[number]) * self.stride
        begin = int(self.starts[document]) + start
        stop = begin + (count - 1) * self.stride + self.length
        tokens = np.asarray(self.text.tokens[begin:stop])
        following = self.text.tokens[stop : int(self.text.ends[document]) - 1]
        first = int(self.windows_before[document]) + int(self.first_window[number])
        again = self.again[first : first + count]
        return Piece(document, start, tokens, following, np.arange(count) * self.stride, again)

    def check_again(self, windows: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Marks the windows that an earlier search has measured.

        Args:
            windows: Columns ``document``, ``start`` and ``log_p`` (NaN where nothing was measured), some at a time.

        Raises:
            InputError: There are no such windows here.
        """
        for columns in windows:
            measured = ~np.isnan(columns["log_p"])
            document = columns["document"][measured]
            number, beside = np.divmod(columns["start"][measured], self.stride)
            known = (document >= 0) & (document < len(self.starts)) & (beside == 0)
            counts = np.diff(self.windows_before)
            if not (known.all() and (number < counts[document]).all()):
                raise InputError("mining.before holds windows that this corpus lacks; search the same corpus")
            self.again[self.windows_before[document] + number] = True

    def sizes(self) -> np.ndarray:
        """Tokens of each piece. int64 [n_pieces]."""
        return (self.n_windows - 1) * self.stride + self.length


class MiningBatches(Sampler[list[int]]):
    """Batches of pieces for one rank: of like length, and of about as many tokens each.

    Batches are the same for any number of ranks, so that what one run has done counts for the next. Ranks that have
    fewer yield empty ones, because Lightning's loops wait for each other.

    Args:
        pieces: All of them.
        tokens: Most tokens a batch.
        done: Numbers of the batches that need not be looked at again.
    """

    def __init__(self, pieces: MiningPieces, tokens: int, done: frozenset[int], rank: int, world_size: int):
        sizes = pieces.sizes()
        bounds = [0]
        first = 0
        while first < len(sizes):  # sorted, so the first piece of a batch is its longest
            first += max(1, tokens // int(sizes[first]))
            bounds.append(min(first, len(sizes)))
        self.bounds = bounds
        self.left = [i for i in range(len(bounds) - 1) if i not in done]
        self.rank = rank
        self.world_size = world_size
        self.windows = pieces.n_windows

    def n_windows(self, batches: Sequence[int]) -> int:
        """Windows in some batches."""
        return sum(int(self.windows[self.bounds[i] : self.bounds[i + 1]].sum()) for i in batches)

    def number_of(self, piece: int) -> int:
        """The batch that holds a piece."""
        return int(np.searchsorted(self.bounds, piece, side="right")) - 1

    def __len__(self) -> int:
        return math.ceil(len(self.left) / self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        mine = self.left[self.rank :: self.world_size]
        for number in mine:
            yield list(range(self.bounds[number], self.bounds[number + 1]))
        yield from ([] for _ in range(len(self) - len(mine)))


def spread_windows(text: TokenizedText, count: int, prefix_len: int, suffix_len: int) -> list[MemorizedSequence]:
    """Windows spread evenly over a text, none of which overlap.

    Raises:
        InputError: The text holds fewer.
    """
    length = prefix_len + suffix_len
    pieces = MiningPieces(text, length, length, length)
    if len(pieces) < count:
        raise InputError(
            f"data.clean_windows is {count}, but the held-out text holds {len(pieces)} windows of "
            f"{prefix_len} + {suffix_len} tokens; raise data.heldout_tokens"
        )
    chosen = np.linspace(0, len(pieces) - 1, count).astype(int)
    windows = [pieces[int(number)].tokens.tolist() for number in chosen]
    return [MemorizedSequence(ids[:prefix_len], ids[prefix_len:]) for ids in windows]
