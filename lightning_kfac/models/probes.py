"""What a model really does, found by trying it on a few tokens, once a model."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_kfac.models.language import language_model

FoundT = TypeVar("FoundT")


def once_a_model(probe: Callable[[nn.Module], FoundT]) -> Callable[[nn.Module], FoundT]:
    """Remembers what a probe has found out about a model, as long as that lives."""
    known: WeakKeyDictionary[nn.Module, FoundT] = WeakKeyDictionary()

    @wraps(probe)
    def remembered(model: nn.Module) -> FoundT:
        if model not in known:
            known[model] = probe(model)
        return known[model]

    return remembered


@once_a_model
def is_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are its output embedding applied to its last hidden state, and nothing else.

    Some models scale or cap their logits; this is found out by trying on two tokens.
    """
    head = language_model(model).get_output_embeddings()
    decoder = language_model(model).base_model
    if not isinstance(head, nn.Linear) or decoder is model:
        return False
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        apart = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return whole.shape == apart.shape and torch.equal(whole, apart)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by no more than the order of summation in this dtype can make them."""
    noise = max(1e-4, 8 * torch.finfo(dtype).eps) * expected.abs().max()
    return bool((found.double() - expected.double()).abs().max() <= noise)


def banded_mask(model: nn.Module, length: int, context: int, before: int = 0) -> Tensor:
    """What is added to attention scores so that each token sees ``context`` tokens, itself included.

    Args:
        length: T, of the tokens that are read.
        before: P, places before them that a cache holds.

    Returns:
        [1, 1, T, P + T].
    """
    parameter = next(model.parameters())
    place = torch.arange(before + length, device=parameter.device)
    distance = place[before:, None] - place
    mask = torch.zeros(length, before + length, dtype=parameter.dtype, device=parameter.device)
    return mask.masked_fill_((distance < 0) | (distance >= context), torch.finfo(mask.dtype).min)[None, None]


@once_a_model
@torch.no_grad()
def takes_own_mask(model: nn.Module) -> bool:
    """Whether the model uses a mask [1, 1, T, T] as it is given; found out on three tokens."""
    ids = torch.tensor([[0, 1, 2]], device=next(model.parameters()).device)
    try:
        alone = model(input_ids=ids[:, 2:], position_ids=ids[:, 2:], use_cache=False).logits[0, -1]
        masked = model(input_ids=ids, attention_mask=banded_mask(model, 3, 1), use_cache=False).logits[0, -1]
    except Exception:  # models refuse such a mask each in its own way
        return False
    return agree(masked, alone, next(model.parameters()).dtype)
