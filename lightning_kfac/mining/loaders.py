"""Batches of pieces of documents to look through."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from lightning_kfac.errors import InputError
from lightning_kfac.mining.log import MiningLog
from lightning_kfac.mining.windows import MiningBatches, MiningPieces, Piece


class _Pieces(Dataset[tuple[int, Piece]]):
    """Pieces of documents by number, each with its number."""

    def __init__(self, pieces: MiningPieces):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> tuple[int, Piece]:
        return number, self.pieces[number]


class Search(NamedTuple):
    """A search through a corpus, which may go on from an earlier one.

    Attributes:
        log: What has been searched.
        loader: The pieces that are left to this rank.
        windows_left: Windows in them.
        n_batches: Batches of the whole search, on all ranks.
    """

    log: MiningLog
    loader: DataLoader[tuple[int, Piece]]
    windows_left: int
    n_batches: int


def begin_search(
    pieces: MiningPieces, log: MiningLog, tokens_at_once: int, rank: int, world: int, wait: Callable[[str], None]
) -> Search:
    """Begins a search, or goes on with one.

    Args:
        pieces: Of all documents.
        log: Of an earlier search of the same, if there was one.
        tokens_at_once: Of a batch.
        rank, world: This process and the number of all.
        wait: Until all ranks are there.

    Raises:
        InputError: No document holds a window.
    """
    if not len(pieces):
        raise InputError(f"no document of the corpus is as long as one window of {pieces.length} tokens")
    done = log.done()
    wait("mining log")  # nobody writes before all have read
    batches = MiningBatches(pieces, tokens_at_once, done, rank, world)
    return Search(log, _loader(pieces, batches), batches.n_windows(batches.left), len(batches.bounds) - 1)


def _loader(pieces: MiningPieces, batches: MiningBatches) -> DataLoader[tuple[int, Piece]]:
    """Pieces in batches for one rank; a batch knows its number, and an empty one has none."""

    def collate(rows: list[tuple[int, Piece]]) -> dict[str, Any]:
        return {"batch": batches.number_of(rows[0][0]) if rows else None, "pieces": [piece for _, piece in rows]}

    return DataLoader(_Pieces(pieces), batch_sampler=batches, collate_fn=collate)
