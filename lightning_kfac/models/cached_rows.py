"""Rows of tokens that a model reads piece by piece: with its key-value cache, or anew from their beginning."""

import inspect
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import Self

from lightning_kfac.console import say
from lightning_kfac.models.language import language_model
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.manner import SHORT, Trial, distance, manner_of, trying
from lightning_kfac.models.probes import once_a_model
from lightning_kfac.models.tokens import TokenBatch, left_padded


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
    cached = not manner.is_apart(longest) and (has_plain_cache(model) or has_cache(model))
    return CachedRows(model, count) if cached else RereadRows(model, count)


def bears_gaps(rows: ReadRows) -> bool:
    """Whether tokens may be left out of account that were read, and rows be taken by themselves."""
    return not isinstance(rows, CachedRows) or has_plain_cache(rows.model)


class CachedRows:
    """Rows that a model remembers in its key-value cache, where positions count real tokens only.

    Places without a token take a place in the cache. ``take`` and ``forget_after`` need ``has_plain_cache``.

    Attributes:
        attend: As of ``ReadRows``.
    """

    def __init__(self, model: nn.Module, count: int):
        self.model = model
        self.cache: Cache | None = None
        self.attend = torch.zeros(count, 0, dtype=torch.bool, device=next(model.parameters()).device)
        self._slices_head = "logits_to_keep" in inspect.signature(model.forward).parameters

    def read(self, ids: Tensor, real: Tensor, keep: int = 1) -> Tensor:
        """As ``ReadRows.read``."""
        positions = (self.attend.sum(1, keepdim=True) + real.long().cumsum(1) - 1).clamp(min=0)
        self.attend = torch.cat([self.attend, real], dim=1)
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
        taken = CachedRows(self.model, len(rows))
        taken.attend = self.attend[rows]
        taken.cache = DynamicCache()
        for number, (keys, values) in enumerate(_kept(self.cache)):
            taken.cache.update(keys[rows], values[rows], number)
        return taken

    def forget_after(self, lengths: Tensor) -> None:
        """As ``ReadRows.forget_after``."""
        self.attend = self.attend & (self.attend.cumsum(1) <= lengths[:, None])


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
    rows = CachedRows(model, 2)
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
