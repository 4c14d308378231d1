"""Rows of tokens that a model reads piece by piece, and their greedy continuations."""

import inspect
from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_kfac.errors import InputError

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class CachedRows:
    """B rows of tokens, what a model remembers of them, and which of it counts.

    What is read may hold places without a token, before or after the real ones; they take a place in the cache that
    nothing attends to. Positions count real tokens only.

    Attributes:
        attend: bool [B, S], which places of the cache hold a token that counts.
    """

    def __init__(self, model: nn.Module, count: int):
        self.model, self.cache = model, None
        self.attend = torch.zeros(count, 0, dtype=torch.bool, device=next(model.parameters()).device)
        takes = inspect.signature(model.forward).parameters
        if "past_key_values" not in takes:
            raise InputError(
                f"{type(model).__name__} has no key-value cache (a recurrent state, say): its recitation cannot be "
                "measured"
            )
        self._slices_head = "logits_to_keep" in takes

    def read(self, ids: Tensor, real: Tensor, keep: int = 1) -> Tensor:
        """Runs the next places through the model.

        Args:
            ids: int64 [B, n].
            real: bool [B, n], False where there is no token.
            keep: Of how many of the last places the logits are wanted.

        Returns:
            [B, keep, V] in the model's dtype.
        """
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
        """Some of the rows, by number, with a cache of their own. Needs ``has_plain_cache``."""
        taken = CachedRows(self.model, len(rows))
        taken.attend, taken.cache = self.attend[rows], DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            taken.cache.update(layer.keys[rows], layer.values[rows], number)
        return taken

    def forget_after(self, lengths: Tensor) -> None:
        """Keeps of each row only the first so many tokens. int64 [B]."""
        self.attend = self.attend & (self.attend.cumsum(1) <= lengths[:, None])


@torch.no_grad()
def has_plain_cache(model: nn.Module) -> bool:
    """Whether places of the cache may be left out of account: no sliding windows, no distances counted in places.

    What the config says is checked, and one gap is tried out (ALiBi, for one, counts places). Found out once a model.
    """
    if model not in _PLAIN:
        windows = getattr(model.config, "window_size", None) is not None  # GPT-Neo has its own in the model
        layers = DynamicCache(config=model.config).layers
        _PLAIN[model] = not windows and all(type(layer) is DynamicLayer for layer in layers) and _bears_a_gap(model)
    return _PLAIN[model]


def _bears_a_gap(model: nn.Module) -> bool:
    device, last = next(model.parameters()).device, []
    for row, kept in (([0, 1] + 16 * [2], 2), ([0, 1], 2)):
        rows = CachedRows(model, 1)
        ids = torch.tensor([row], device=device)
        rows.read(ids, torch.ones_like(ids, dtype=torch.bool))
        rows.forget_after(torch.tensor([kept], device=device))
        token = torch.tensor([[4]], device=device)
        last.append(rows.read(token, torch.ones_like(token, dtype=torch.bool))[0, -1].double())
    return agree(*last, next(model.parameters()).dtype)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by no more than the order of summation in this dtype can make them."""
    noise = max(1e-4, 8 * torch.finfo(dtype).eps) * expected.abs().max()
    return bool((found.double() - expected.double()).abs().max() <= noise)


@torch.no_grad()
def greedy_continuations(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    lengths: Sequence[int],
    end_of_text: Collection[int] = frozenset(),
) -> list[list[int]]:
    """Continues every prefix greedily by its own number of tokens.

    Prefixes are padded on the left, so all of them decode from their last real token. The argmax is
    taken over float32 logits, ties to the lowest id. No generation setting of the checkpoint applies.

    Args:
        prefixes: B non-empty lists of token ids.
        lengths: B numbers of tokens to generate.
        end_of_text: A row stops after one of these.

    Returns:
        B lists; shorter than asked for where the text ended.
    """
    if not prefixes or not any(lengths):
        return [[] for _ in prefixes]
    rows = CachedRows(model, len(prefixes))
    ids, real = left_padded(prefixes, rows.attend.device)
    first = rows.read(ids, real)[:, -1].float().argmax(-1)
    return continue_greedily(rows, first, torch.tensor(list(lengths)), end_of_text)


def continue_greedily(
    rows: CachedRows, first: Tensor, lengths: Tensor, end_of_text: Collection[int] = frozenset()
) -> list[list[int]]:
    """Decodes rows from their first generated token on, which the model has not read yet.

    Args:
        first: int64 [B].
        lengths: int64 [B], tokens to generate, the first one included.
        end_of_text: A row stops after one of these.
    """
    stop = torch.tensor(sorted(end_of_text), device=first.device, dtype=torch.long)
    lengths, token = lengths.to(first.device), first
    running, generated = lengths > 0, []
    while True:
        generated.append(torch.where(running, token, -1))
        running = running & (lengths > len(generated)) & ~torch.isin(token, stop)
        if not running.any():
            return [[t for t in row if t >= 0] for row in torch.stack(generated, dim=1).tolist()]
        # Rows that have ended read nothing: their positions must not grow beyond what the model takes.
        token = rows.read(token[:, None], running[:, None])[:, -1].float().argmax(-1)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, width] and which of them are real, bool [B, width]."""
    return _padded([[None] * (max(map(len, rows)) - len(row)) + list(row) for row in rows], device)


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same with the padding behind the tokens."""
    return _padded([list(row) + [None] * (max(map(len, rows)) - len(row)) for row in rows], device)


def _padded(rows: list[list[int | None]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[-1 if token is None else token for token in row] for row in rows], device=device)
    ids = ids.view(len(rows), -1).long()
    return ids.clamp(min=0), ids >= 0
