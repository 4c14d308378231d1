"""Rows of tokens that a model reads piece by piece: with its key-value cache, or anew from their beginning."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import Self, override

from lightning_kfac.console import say
from lightning_kfac.models.language import language_model
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.manner import SHORT, Trial, distance, manner_of, trying
from lightning_kfac.models.probes import once_a_model
from lightning_kfac.models.tokens import TokenBatch, left_padded

# Places by which a cache grows once its room is full.
MORE_ROOM = 32


class ReadRows(Protocol):
    """B rows of tokens that a model reads piece by piece.

    What is read may hold places without a token, before or after the real ones; nothing attends to them.

    Attributes:
        attend: bool [B, S], which of the places that were read hold a token that counts.
    """

    attend: Tensor

    def read(self, ids: Tensor, real: Tensor, keep: int = 1) -> Tensor:
        """Runs the next places through the model.

        Args:
            ids: int64 [B, n].
            real: bool [B, n], False where there is no token.
            keep: Of how many of the last places the logits are wanted.

        Returns:
            [B, keep, V] in the model's dtype.
        """

    def take(self, rows: Tensor) -> Self:
        """Some of the rows, by number, on their own."""

    def forget_after(self, lengths: Tensor) -> None:
        """Keeps of each row only the first so many tokens. int64 [B]."""

    def joined(self, others: Sequence[Self]) -> Self:
        """These rows and then others of the same model, in as few places as the longest of them has tokens."""


def read_rows(model: nn.Module, count: int, longest: int) -> ReadRows:
    """Rows as a model reads them right: with its cache, where that goes on with padded rows, or anew each time.

    Args:
        count: B.
        longest: Tokens of the longest row, to the last one that will be read.

    Raises:
        InputError: The model cannot be measured, or not on rows of this length; see ``manner_of``.
    """
    manner = manner_of(model)
    manner.check_length(model, longest)
    if manner.is_apart(longest):
        return RereadRows(model, count)
    if has_plain_cache(model):
        return CachedRows(model, count, room=longest)
    return CachedRows(model, count) if has_cache(model) else RereadRows(model, count)


def bears_gaps(rows: ReadRows) -> bool:
    """Whether tokens may be left out of account that were read, and rows be taken by themselves."""
    return not isinstance(rows, CachedRows) or has_plain_cache(rows.model)


class CachedRows:
    """Rows that a model remembers in its key-value cache, where positions count real tokens only.

    Places without a token take a place in the cache. ``take``, ``forget_after`` and ``joined`` need
    ``has_plain_cache``.

    Args:
        room: Places that will be read, as far as is known; None leaves it to the model which cache it uses.

    Attributes:
        attend: As of ``ReadRows``.
    """

    def __init__(self, model: nn.Module, count: int, room: int | None = None):
        self.model = model
        self.room = room
        self.cache: Cache | None = None if room is None else _RoomyCache(room)
        self.attend = torch.zeros(count, 0, dtype=torch.bool, device=next(model.parameters()).device)
        self._slices_head = "logits_to_keep" in inspect.signature(model.forward).parameters

    def read(self, ids: Tensor, real: Tensor, keep: int = 1) -> Tensor:
        """As ``ReadRows.read``."""
        positions = (self.attend.sum(1, keepdim=True) + real.long().cumsum(1) - 1).clamp(min=0)
        self.attend = torch.cat([self.attend, real], dim=1)
        with _untrainable_head(self.model):
            output = self.model(
                input_ids=ids,
                attention_mask=self.attend.long(),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **({"logits_to_keep": keep} if self._slices_head else {}),
            )
        self.cache = output.past_key_values
        return output.logits[:, -keep:]

    def take(self, rows: Tensor) -> "CachedRows":
        """As ``ReadRows.take``, with a cache of their own."""
        return self._with(self.attend[rows], ((keys[rows], values[rows]) for keys, values in _kept(self.cache)))

    def forget_after(self, lengths: Tensor) -> None:
        """As ``ReadRows.forget_after``."""
        self.attend = self.attend & (self.attend.cumsum(1) <= lengths[:, None])

    def joined(self, others: "Sequence[CachedRows]") -> "CachedRows":
        """As ``ReadRows.joined``, with a cache of their own unless nothing changes."""
        every = [self, *others]
        orders = [_tokens_last(rows.attend) for rows in every]
        width = max(order.shape[1] for order in orders)
        if not others and width == self.attend.shape[1]:
            return self

        def packed(parts: Iterable[Tensor]) -> Tensor:
            """Keys or values [B, heads, S, d] of all rows."""
            return torch.cat([_in_order(part, order, width) for part, order in zip(parts, orders, strict=True)])

        attend = packed(rows.attend[:, None, :, None] for rows in every)[:, 0, :, 0]
        layers = zip(*(_kept(rows.cache) for rows in every), strict=True)
        return self._with(attend, (tuple(map(packed, zip(*layer, strict=True))) for layer in layers))

    def _with(self, attend: Tensor, layers: Iterable[tuple[Tensor, ...]]) -> "CachedRows":
        """Other rows, of which these are the keys and values of each layer."""
        rows = CachedRows(self.model, len(attend), self.room)
        rows.attend = attend
        rows.cache = _RoomyCache(self.room or 0)
        for number, (keys, values) in enumerate(layers):
            rows.cache.update(keys, values, number)
        return rows


@contextmanager
def _untrainable_head(model: nn.Module) -> Iterator[None]:
    """The last positions of rows are not contiguous: torch multiplies them in one of two ways, which round differently,
    and which one depends on whether the weight is trainable, also where no gradient is taken.
    """
    weight = language_model(model).get_output_embeddings().weight
    trainable = weight.requires_grad
    try:
        weight.requires_grad_(False)
        yield
    finally:
        weight.requires_grad_(trainable)


class RereadRows:
    """Rows that a model reads from their beginning, whenever more of them is read: for models without a usable cache.

    Attributes:
        ids: int64 [B, S], what was read.
        attend: As of ``ReadRows``.
    """

    def __init__(self, model: nn.Module, count: int):
        self.model = model
        device = next(model.parameters()).device
        self.ids = torch.zeros(count, 0, dtype=torch.long, device=device)
        self.attend = torch.zeros(count, 0, dtype=torch.bool, device=device)

    def read(self, ids: Tensor, real: Tensor, keep: int = 1) -> Tensor:
        """As ``ReadRows.read``; of rows in which nothing is read, zeros."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.attend = torch.cat([self.attend, real], dim=1)
        running = real.any(1)
        attend = self.attend[running]
        places = (attend.cumsum(1) - 1).clamp(min=0)[:, -keep:]
        batch = TokenBatch.from_dict({"input_ids": self.ids[running], "attention_mask": attend}).trimmed()
        read = torch.cat([logits for _, logits in logits_in_slices(self.model, batch, places)])
        logits = read.new_zeros(len(ids), keep, read.shape[-1])
        logits[running] = read.view(-1, keep, read.shape[-1])
        return logits

    def take(self, rows: Tensor) -> "RereadRows":
        """As ``ReadRows.take``."""
        taken = RereadRows(self.model, len(rows))
        taken.ids = self.ids[rows]
        taken.attend = self.attend[rows]
        return taken

    def forget_after(self, lengths: Tensor) -> None:
        """As ``ReadRows.forget_after``."""
        self.attend = self.attend & (self.attend.cumsum(1) <= lengths[:, None])

    def joined(self, others: "Sequence[RereadRows]") -> "RereadRows":
        """As ``ReadRows.joined``."""
        tokens = [
            ids[real].tolist() for rows in (self, *others) for ids, real in zip(rows.ids, rows.attend, strict=True)
        ]
        joined = RereadRows(self.model, len(tokens))
        joined.ids, joined.attend = left_padded(tokens, self.ids.device)
        return joined


class _RoomyLayer(DynamicLayer):
    """A layer of a cache that does not copy all it holds whenever a token is added.

    Args:
        room: Places for which memory is set aside at first.
    """

    def __init__(self, room: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._room = room
        self._memory: list[Tensor] = []

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds [B, heads, n, d]; returns all there are, views of the memory."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        count = held + key_states.shape[-2]
        if not self._memory or count > self._memory[0].shape[-2]:
            places = self._room if count <= self._room else count + MORE_ROOM
            before = self._memory
            self._memory = [
                states.new_empty(*states.shape[:-2], places, states.shape[-1]) for states in (key_states, value_states)
            ]
            for memory, old in zip(self._memory, before, strict=False):  # at first there is nothing to keep
                memory[..., :held, :] = old[..., :held, :]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., held:count, :] = states
        self.keys, self.values = (memory[..., :count, :] for memory in self._memory)
        return self.keys, self.values


class _RoomyCache(DynamicCache):
    """A cache of such layers, for models whose layers all are plain ones.

    Args:
        room: Places for which memory is set aside at first.
    """

    def __init__(self, room: int):
        super().__init__()
        self._room = room

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds to a layer [B, heads, n, d]; returns all it holds."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_RoomyLayer(self._room))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _tokens_last(attend: Tensor) -> Tensor:
    """Places of each row in their order, those with a token last, as many as the longest row has. int64 [B, n]."""
    longest = int(attend.sum(1).max())
    return attend.long().argsort(dim=1, stable=True)[:, attend.shape[1] - longest :]


def _in_order(states: Tensor, order: Tensor, width: int) -> Tensor:
    """Places of rows [B, heads, S, d] in another order [B, n], behind as many empty ones as make ``width``."""
    index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return F.pad(states.gather(2, index), (0, 0, width - order.shape[1], 0))


def _kept(cache: Cache | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a plain cache."""
    for layer in () if cache is None else cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise RuntimeError(f"rows cannot be taken of a cache with a {type(layer).__name__}, see has_plain_cache")
        yield layer.keys, layer.values


@once_a_model
def has_plain_cache(model: nn.Module) -> bool:
    """Whether places of the cache may be left out of account: no sliding windows, no distances counted in places.

    What the config says is checked, and a gap is tried out (ALiBi, for one, counts places).
    """
    config = language_model(model).config
    windows = getattr(config, "window_size", None) is not None  # GPT-Neo has its own in the model
    layers = DynamicCache(config=config).layers
    return not windows and all(type(layer) is DynamicLayer for layer in layers) and _goes_on(model, gap=True)


@once_a_model
def has_cache(model: nn.Module) -> bool:
    """Whether padded rows go on token by token with the model's cache as they would be read alone."""
    found = _goes_on(model, gap=False)
    if not found:
        say(
            f"{type(model).__name__}: its cache does not go on with padded rows as they are read alone, so every token "
            "of a continuation reads its row anew"
        )
    return found


def _goes_on(model: nn.Module, gap: bool) -> bool:
    """Whether two rows, one of them padded in front, are read with a cache as they are alone."""
    try:
        with trying(model):
            trial = Trial(model)
            expected = trial.logits(trial.long[None])[0, -SHORT:]
            # Where another context hardly changes the logits, a wrong one would not show.
            tells = distance(expected[-1], trial.alone[-1]) > 4 * trial.tolerance
            found = _read_in_pieces(model, trial, gap)
            return tells and trial.same(found[0], trial.alone) and trial.same(found[1], expected)
    except Exception:  # models without a cache, or with another one, fail each in its own way
        return False


def _read_in_pieces(model: nn.Module, trial: Trial, gap: bool) -> Tensor:
    """Logits of the last tokens of the two rows. float64 [2, SHORT, V]."""
    rows = CachedRows(model, 2, room=0 if gap else None)
    ids, real = left_padded([trial.short.tolist(), trial.long.tolist()], rows.attend.device)
    steps = [2, 1] if gap else [1, 1, 1]
    ends = [ids.shape[1] - 3]
    found = [rows.read(ids[:, : ends[0]], real[:, : ends[0]], SHORT - 3)]
    if gap:
        rows.read(trial.behind.repeat(2, 1), torch.ones_like(trial.behind, dtype=torch.bool).repeat(2, 1))
        rows.forget_after(real[:, : ends[0]].sum(1))
    for n in steps:
        piece = slice(ends[-1], ends[-1] + n)
        found.append(rows.read(ids[:, piece], real[:, piece], n))
        ends.append(piece.stop)
    return torch.cat(found, dim=1).double()
