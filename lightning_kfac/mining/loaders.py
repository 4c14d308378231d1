"""Batches of pieces of documents to look through."""

from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_kfac.mining.windows import MiningBatches, MiningPieces, Piece


class _Pieces(Dataset[tuple[int, Piece]]):
    """Pieces of documents by number, each with its number."""

    def __init__(self, pieces: MiningPieces):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> tuple[int, Piece]:
        return number, self.pieces[number]


def piece_loader(pieces: MiningPieces, batches: MiningBatches) -> DataLoader[tuple[int, Piece]]:
    """Pieces in batches for one rank; a batch knows its number, and an empty one has none."""

    def collate(rows: list[tuple[int, Piece]]) -> dict[str, Any]:
        return {"batch": batches.number_of(rows[0][0]) if rows else None, "pieces": [piece for _, piece in rows]}

    return DataLoader(_Pieces(pieces), batch_sampler=batches, collate_fn=collate)
