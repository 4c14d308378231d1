"""A batch of token rows, with its two masks made explicit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self, TypeVar

from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import IGNORED, next_tokens, valid_positions
from lightning_kfac.models.manner import manner_of


class Splits(Protocol):
    """A batch that can be cut into rows."""

    def split(self, rows: int) -> Iterator[Self]:
        """Parts of at most ``rows`` rows."""


BatchT = TypeVar("BatchT", bound=Splits)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for a causal language model, padded behind their tokens.

    Attributes:
        input_ids: int64 [B, T].
        attend: bool [B, T], True where the token is real. Never inferred from the pad id: a genuine
            end-of-text token may share it.
        targets: int64 [B, T], the label of each position (the next token), -100 where it has none that
            counts: t or t + 1 is no real token, or its label is -100.
        sample_index: int64 [B], global row numbers; they key the sampled labels.
        dense: Every token is real, so masks can be left out.
        complete: Every position counts.
        uniforms: float64 [B, draws, T], what draws the sampled labels.
    """

    input_ids: Tensor
    attend: Tensor
    targets: Tensor
    sample_index: Tensor
    dense: bool = False
    complete: bool = False
    uniforms: Tensor | None = None

    @classmethod
    def from_dict(cls, batch: Mapping[str, Any], first_index: int = 0) -> "TokenBatch":
        """Reads ``input_ids`` and optionally ``attention_mask``, ``labels``, ``sample_index``, ``dense``.

        Args:
            batch: ``labels`` are in the Hugging Face convention (unshifted, -100 ignored). ``dense``
                says that all tokens are real; a batch with neither mask nor labels is dense. The last
                token of dense rows, which has no next one, is then not run through the model at all. Of
                other rows the real tokens move to the front, wherever their padding was.
            first_index: Number of the first row where the batch has no ``sample_index``.

        Raises:
            InputError: A field is missing or has another shape than ``input_ids``.
        """
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise InputError("a batch needs `input_ids`, an integer tensor [rows, positions]")
        mask = batch.get("attention_mask")
        labels = batch.get("labels")
        index = batch.get("sample_index")
        for name, field in (("attention_mask", mask), ("labels", labels)):
            if field is not None and field.shape != ids.shape:
                raise InputError(f"batch: {name} has shape {list(field.shape)}, input_ids {list(ids.shape)}")
        if index is None:
            index = torch.arange(first_index, first_index + len(ids), device=ids.device)
        attend = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if batch.get("dense", mask is None and labels is None) and ids.shape[1] > 1:
            targets = (ids if labels is None else labels)[:, 1:]
            return cls(ids[:, :-1], attend[:, :-1], targets, index, dense=True, complete=labels is None)
        labels = ids.masked_fill(~attend, IGNORED) if labels is None else labels
        targets = next_tokens(labels).masked_fill(~valid_positions(attend, labels), IGNORED)
        ids, attend, targets = _real_first(attend, ids, attend, targets)
        return cls(ids, attend, targets, index)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        rows, positions = self.input_ids.shape
        return rows, positions

    @property
    def counted(self) -> Tensor | None:
        """``valid``, or None where every position counts."""
        return None if self.complete else self.valid

    @property
    def valid(self) -> Tensor:
        """bool [B, T]: positions that count in the loss, in A, in G and in N."""
        return self.targets != IGNORED

    @property
    def position_ids(self) -> Tensor:
        """int64 [B, T]: index among the row's real tokens."""
        return (self.attend.long().cumsum(-1) - 1).clamp(min=0)

    def check_ids(self, vocabulary: int) -> None:
        """Raises ``InputError`` for an id that the model does not know; looks at ids on the CPU only."""
        largest = max(int(self.input_ids.max()), int(self.targets.max())) if self.input_ids.is_cpu else -1
        if largest >= vocabulary:
            raise InputError(f"id {largest} is outside the model's vocabulary (0 to {vocabulary - 1})")

    def model_inputs(self, model: nn.Module) -> dict[str, Tensor | bool]:
        """Arguments of the model's forward, in the manner in which it reads rows as if each were alone.

        Raises:
            InputError: It reads no rows of this length so, or none at all; see ``manner_of``.
        """
        manner = manner_of(model)
        manner.check_length(model, self.input_ids.shape[1])
        inputs: dict[str, Tensor | bool] = {"input_ids": self.input_ids, "use_cache": False}
        if not self.dense or (manner.masks_all and not manner.is_apart(self.input_ids.shape[1])):
            inputs["attention_mask"] = self.attend.long()
        return inputs

    def logits(self, model: nn.Module) -> Tensor:
        """Runs the model. [B, T, V] in the model's dtype."""
        return model(**self.model_inputs(model)).logits

    def gold_loss(self, model: nn.Module) -> Tensor:
        """Summed cross-entropy against the next tokens, a scalar tensor with the whole graph behind it."""
        logits = self.logits(model).float()
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def split(self, rows: int) -> Iterator["TokenBatch"]:
        """Parts of at most ``rows`` rows."""
        for start in range(0, len(self.input_ids), rows):
            yield self._map(itemgetter(slice(start, start + rows)))

    def trimmed(self) -> "TokenBatch":
        """Without the places at the end that hold padding in every row."""
        width = max(1, int(self.attend.sum(1).max()))
        return self._map(lambda field: field[..., :width] if field.ndim > 1 else field)

    def alone(self) -> Iterator["TokenBatch"]:
        """Each row by itself, without padding; of a row that is all padding, one place."""
        return (replace(row.trimmed(), dense=True) for row in self.split(1))

    def by_length(self) -> Iterator["TokenBatch"]:
        """Short rows and long ones apart, each part without the padding on the right that none of its rows needs."""
        lengths = self.attend.shape[1] - self.attend.flip(1).long().argmax(1)
        short = lengths <= lengths.max() // 2
        for rows in (short, ~short):
            if rows.any():
                width = int(lengths[rows].max())
                cut = {name: getattr(self, name)[rows, :width] for name in ("input_ids", "attend", "targets")}
                yield replace(self, **cut, sample_index=self.sample_index[rows], uniforms=None)

    def to(self, *args: Any, **kwargs: Any) -> "TokenBatch":
        """The batch on another device, as ``Tensor.to``."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TokenBatch":
        return replace(
            self,
            input_ids=function(self.input_ids),
            attend=function(self.attend),
            targets=function(self.targets),
            sample_index=function(self.sample_index),
            uniforms=None if self.uniforms is None else function(self.uniforms),
        )


def parts_of(model: nn.Module, batch: BatchT, rows: int) -> list[BatchT]:
    """Parts of at most ``rows`` rows that the model may read together: of tokens, or of another task's batch."""
    if isinstance(batch, TokenBatch) and manner_of(model).is_apart(batch.shape[1]):
        return cast("list[BatchT]", list(batch.alone()))  # of the type that was given
    return list(batch.split(rows))


def trial_batch(positions: int) -> dict[str, Tensor]:
    """One row of token 0, to try a model on."""
    return {"input_ids": torch.zeros(1, positions, dtype=torch.long)}


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, width] and which of them are real, bool [B, width]."""
    return _padded([[None] * (max(map(len, rows)) - len(row)) + list(row) for row in rows], device)


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same with the padding behind the tokens."""
    return _padded([list(row) + [None] * (max(map(len, rows)) - len(row)) for row in rows], device)


def _real_first(attend: Tensor, *fields: Tensor) -> list[Tensor]:
    """Fields [B, T] of rows whose real tokens stand in front, in their order."""
    if bool((attend[:, :-1] >= attend[:, 1:]).all()):
        return list(fields)
    order = attend.long().argsort(dim=1, descending=True, stable=True)
    return [field.gather(1, order) for field in fields]


def _padded(rows: list[list[int | None]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[-1 if token is None else token for token in row] for row in rows], device=device)
    ids = ids.view(len(rows), -1).long()
    return ids.clamp(min=0), ids >= 0
