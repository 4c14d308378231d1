"""Token rows and memorized sequences as data loaders, shared out over ranks without duplicates."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Generic, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.questions import Question
from lightning_kfac.math.loss import IGNORED

FILLER = -1
NOWHERE: Mapping[int, Sequence[int]] = MappingProxyType({})
T = TypeVar("T")


class Position(TypedDict):
    """How far a reading of rows has come: full batches of all ranks take the rows in order."""

    rows: int
    batches: int


class ShardedBatches(Sampler[list[int]]):
    """Batches of row numbers for one rank.

    Rank r takes rows r, r + W, r + 2 W, ... of the (possibly shuffled) order. All ranks yield the
    same number of batches of the same size, because Lightning's loops wait for each other; where rows
    run out, ``FILLER`` stands, which loaders turn into rows of weight 0.
    """

    def __init__(self, n_rows: int, batch_size: int, rank: int, world_size: int, shuffle_seed: int | None = None):
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle_seed = shuffle_seed
        self.epoch = 0
        self.sampler = self  # where Lightning looks for something with set_epoch
        self._start = Position(rows=0, batches=0)
        self._next_start: Position | None = None
        self._yielded = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch; it changes the shuffle."""
        self.epoch = epoch

    @property
    def position(self) -> Position:
        """Where the present reading is, on all ranks together."""
        rows = self._start["rows"] + self._yielded * self.batch_size * self.world_size
        return Position(rows=min(rows, self.n_rows), batches=self._start["batches"] + self._yielded)

    def start_at(self, position: Position) -> None:
        """Has the next reading, and only that one, go on from a position, be it of another number of ranks."""
        self._start = self._next_start = Position(rows=position["rows"], batches=position["batches"])
        self._yielded = 0

    def __len__(self) -> int:
        left = math.ceil((self.n_rows - self._start["rows"]) / self.world_size)
        return self._start["batches"] + math.ceil(left / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        self._start = self._next_start or Position(rows=0, batches=0)
        self._next_start = None
        self._yielded = 0
        rows = np.arange(self.n_rows)
        if self.shuffle_seed is not None:
            np.random.default_rng((self.shuffle_seed, self.epoch)).shuffle(rows)
        rows = rows[self._start["rows"] :]
        per_rank = math.ceil(len(rows) / self.world_size)
        mine = np.full(per_rank, FILLER)
        taken = rows[self.rank :: self.world_size]
        mine[: len(taken)] = taken
        for start in range(0, per_rank, self.batch_size):
            self._yielded += 1
            yield mine[start : start + self.batch_size].tolist()


class RowLoader(DataLoader[tuple[int, Tensor]]):
    """A loader that can be stopped and goes on where it was, in the way that Lightning asks for."""

    batch_sampler: ShardedBatches

    def state_dict(self) -> Position:
        """Where it is."""
        return self.batch_sampler.position

    def load_state_dict(self, state: Position) -> None:
        """Has the next reading go on from there."""
        self.batch_sampler.start_at(state)


@dataclass(frozen=True)
class TokenRows(Dataset[tuple[int, Tensor]]):
    """Rows cut from one array of tokens.

    Attributes:
        tokens: int32 [n_tokens].
        offsets: int64 [n_rows + 1], where rows begin and end.
        start: Tokens that begin documents. Nothing predicts them: as labels they do not count.
        ends: int64 [n_documents], behind the last token of each document, where these are known.
        cuts: int64, places of tokens that do not count as labels either: ends where a document was cut.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    start: tuple[int, ...] = ()
    ends: np.ndarray | None = None
    cuts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        row = max(index, 0)
        ids = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        return index, torch.from_numpy(ids.astype(np.int64))

    def unlabelled(self) -> dict[int, list[int]]:
        """Places of ``cuts`` in their rows, by row."""
        cuts = [] if self.cuts is None else self.cuts[self.cuts < self.offsets[-1]].tolist()
        found: dict[int, list[int]] = {}
        for cut, row in zip(cuts, (np.searchsorted(self.offsets, cuts, "right") - 1).tolist(), strict=True):
            found.setdefault(row, []).append(cut - int(self.offsets[row]))
        return found

    def documents_of_targets(self, index: Tensor, length: int) -> Tensor:
        """The document that the token behind each place belongs to.

        Args:
            index: int64 [B], numbers of rows.
            length: T, places from the beginning of a row.

        Returns:
            int64 [B, T], on the CPU; anything where a row has no such token.

        Raises:
            ValueError: The ends of the documents are not known.
        """
        if self.ends is None:
            raise ValueError("these rows do not know their documents")
        places = self.offsets[index.cpu().numpy()][:, None] + np.arange(1, length + 1)
        documents = np.searchsorted(self.ends, places, side="right")
        return torch.from_numpy(np.minimum(documents, len(self.ends) - 1))


def collate_rows(
    rows: list[tuple[int, Tensor]], start: Sequence[int] = (), unlabelled: Mapping[int, Sequence[int]] = NOWHERE
) -> dict[str, Tensor | bool]:
    """Right-pads rows into a batch; a filler row keeps its tokens but has no label that counts.

    Rows of one length without filler need no masks: the batch is then ``dense``.

    Args:
        start: Tokens that do not count as labels, see ``TokenRows``.
        unlabelled: Places that do not count as labels, by row.
    """
    index = torch.tensor([i for i, _ in rows])
    ids = pad_sequence([row for _, row in rows], batch_first=True)
    batch: dict[str, Tensor | bool] = {"input_ids": ids, "sample_index": index.clamp(min=0)}
    filler = (index == FILLER)[:, None]
    begins = torch.isin(ids, torch.tensor(start, dtype=ids.dtype))
    for place, number in enumerate(index.tolist()):
        begins[place, list(unlabelled.get(number, ()))] = True
    if not filler.any() and len({len(row) for _, row in rows}) == 1:
        batch |= {"dense": True}
        return batch | {"labels": ids.masked_fill(begins, IGNORED)} if begins.any() else batch
    mask = pad_sequence([torch.ones_like(row) for _, row in rows], batch_first=True)
    return batch | {"attention_mask": mask, "labels": ids.masked_fill((mask == 0) | filler | begins, IGNORED)}


class SequenceDataset(Dataset[tuple[int, T]], Generic[T]):
    """Memorized sequences, or questions, by number; ``FILLER`` gives the first, marked as filler."""

    def __init__(self, sequences: Sequence[T]):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[int, T]:
        return index, self.sequences[max(index, 0)]


def collate_sequences(
    rows: list[tuple[int, MemorizedSequence]], every: Sequence[MemorizedSequence]
) -> dict[str, list[int] | list[list[int]]]:
    """Token lists as they are (decoding pads them), each with the prefix of another sequence; filler rows are dropped.

    Args:
        every: All sequences. The other one is half of them away.
    """
    kept = [(i, s) for i, s in rows if i != FILLER]
    away = len(every) // 2
    return {
        "index": [i for i, _ in kept],
        "prefix": [list(s.prefix) for _, s in kept],
        "suffix": [list(s.suffix) for _, s in kept],
        "unrelated": [list(every[(i + away) % len(every)].prefix) for i, _ in kept],
    }


def row_loader(rows: TokenRows, batch_size: int, rank: int, world: int, shuffle_seed: int | None = None) -> RowLoader:
    """Token rows in batches for one rank."""
    sampler = ShardedBatches(len(rows), batch_size, rank, world, shuffle_seed)
    collate = partial(collate_rows, start=rows.start, unlabelled=rows.unlabelled())
    return RowLoader(rows, batch_sampler=sampler, collate_fn=collate)


def sequence_loader(
    sequences: Sequence[MemorizedSequence], batch_size: int, rank: int, world: int
) -> DataLoader[tuple[int, MemorizedSequence]]:
    """Memorized sequences in batches for one rank."""
    sampler = ShardedBatches(len(sequences), batch_size, rank, world)
    collate = partial(collate_sequences, every=sequences)
    return DataLoader(SequenceDataset(sequences), batch_sampler=sampler, collate_fn=collate)


def question_loader(
    questions: Sequence[Question], batch_size: int, rank: int, world: int
) -> DataLoader[tuple[int, Question]]:
    """Questions in batches for one rank."""
    sampler = ShardedBatches(len(questions), batch_size, rank, world)
    return DataLoader(SequenceDataset(questions), batch_sampler=sampler, collate_fn=collate_questions)


def collate_questions(rows: list[tuple[int, Question]]) -> dict[str, list[int]]:
    """Numbers of the questions; filler rows are dropped."""
    return {"index": [i for i, _ in rows if i != FILLER]}
