"""Rows of tokens that a model reads piece by piece, with its key-value cache."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from lightning_kfac.errors import InputError
from lightning_kfac.models.language import language_model
from lightning_kfac.models.probes import agree, once_a_model


class CachedRows:
    """B rows of tokens, what a model remembers of them, and which of it counts.

    What is read may hold places without a token, before or after the real ones; they take a place in the cache that
    nothing attends to. Positions count real tokens only.

    Attributes:
        attend: bool [B, S], which places of the cache hold a token that counts.
    """

    def __init__(self, model: nn.Module, count: int):
        self.model = model
        self.cache: Cache | None = None
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
        taken.attend = self.attend[rows]
        taken.cache = DynamicCache()
        for number, (keys, values) in enumerate(_kept(self.cache)):
            taken.cache.update(keys[rows], values[rows], number)
        return taken

    def forget_after(self, lengths: Tensor) -> None:
        """Keeps of each row only the first so many tokens. int64 [B]."""
        self.attend = self.attend & (self.attend.cumsum(1) <= lengths[:, None])


def _kept(cache: Cache | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a plain cache."""
    for layer in () if cache is None else cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise RuntimeError(f"rows cannot be taken of a cache with a {type(layer).__name__}, see has_plain_cache")
        yield layer.keys, layer.values


@once_a_model
@torch.no_grad()
def has_plain_cache(model: nn.Module) -> bool:
    """Whether places of the cache may be left out of account: no sliding windows, no distances counted in places.

    What the config says is checked, and one gap is tried out (ALiBi, for one, counts places).
    """
    config = language_model(model).config
    windows = getattr(config, "window_size", None) is not None  # GPT-Neo has its own in the model
    layers = DynamicCache(config=config).layers
    return not windows and all(type(layer) is DynamicLayer for layer in layers) and _bears_a_gap(model)


def _bears_a_gap(model: nn.Module) -> bool:
    behind_a_gap = _logits_after(model, [0, 1] + 16 * [2])
    return agree(behind_a_gap, _logits_after(model, [0, 1]), next(model.parameters()).dtype)


def _logits_after(model: nn.Module, row: list[int]) -> Tensor:
    """Logits of one more token where only the first two of a row that was read count. float64 [V]."""
    rows = CachedRows(model, 1)
    ids = torch.tensor([row], device=rows.attend.device)
    rows.read(ids, torch.ones_like(ids, dtype=torch.bool))
    rows.forget_after(torch.tensor([2], device=ids.device))
    token = torch.tensor([[4]], device=ids.device)
    return rows.read(token, torch.ones_like(token, dtype=torch.bool))[0, -1].double()
