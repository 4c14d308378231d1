"""A model's own attention with something done to its output, through the attention interface of transformers.

The registered function calls the eager attention of the model's own file, so masks, soft caps, sliding windows and
sinks are the model's. So is the dtype of the probabilities: in bfloat16, eager attention rounds them after a float32
softmax, and more of them are equal. Nothing is written onto the model's modules.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.utils.generic import maybe_autocast

from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lightning_kfac"
# Given the output [B, T, H, d], the probabilities [B, H, T, S] and the values [B, K, S, d]: the output to use.
Transform = Callable[[Tensor, Tensor, Tensor], Tensor]
_TRANSFORMS: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()


@contextmanager
def transformed_attention(model: "PreTrainedModel", transforms: Mapping[int, Transform]) -> Iterator[None]:
    """While the block runs, the attention outputs of some layers pass through a function each.

    All layers run eager attention meanwhile. The implementation of before is put back, also after an error.

    Args:
        model: A Hugging Face causal language model.
        transforms: By layer number (``layer_idx`` of the attention module).

    Raises:
        InputError: The architecture does not support the attention interface.
    """
    if not hasattr(model, "set_attn_implementation") or not any(map(_eager, _numbered(model))):
        raise _unsupported(model)
    before = _implementation(model)
    own = {module: transforms[number] for module, number in _numbered(model).items() if number in transforms}
    outer = {module: _TRANSFORMS[module] for module in own if module in _TRANSFORMS}
    try:
        model.set_attn_implementation(NAME)
        _TRANSFORMS.update(own)
        yield
    finally:
        for module in own:
            _TRANSFORMS.pop(module, None)
        _TRANSFORMS.update(outer)
        model.set_attn_implementation(before)


@torch.no_grad()
def attention_shapes(model: "PreTrainedModel") -> dict[int, tuple[int, int]]:
    """Number of query heads and width of a head of every attention layer, by layer number.

    Found out by running two tokens, which costs nothing on the meta device.

    Raises:
        InputError: The architecture does not support the attention interface.
    """
    shapes: dict[int, tuple[int, int]] = {}

    def remember(layer: int) -> Transform:
        def listen(output: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
            heads, width = output.shape[-2:]
            shapes[layer] = (heads, width)
            return output

        return listen

    with transformed_attention(model, {number: remember(number) for number in _numbered(model).values()}):
        tokens = torch.ones(1, 2, dtype=torch.long, device=model.device)
        model(input_ids=tokens, attention_mask=tokens, use_cache=False)
    if not shapes:
        raise _unsupported(model)
    return dict(sorted(shapes.items()))


def resolve_layers(layers: Iterable[int], existing: Iterable[int]) -> list[int]:
    """Layer numbers, negative ones counted from the end.

    Raises:
        InputError: A layer does not exist, or none is named.

    Example:
        >>> resolve_layers([-1, 0], range(6))
        [0, 5]
    """
    known = sorted(existing)
    found = {layer: layer + known[-1] + 1 if layer < 0 else layer for layer in layers}
    if missing := [layer for layer, number in found.items() if number not in known]:
        some = f"{known[0]} to {known[-1]}" if len(known) > 2 else " and ".join(map(str, known))
        raise InputError(f"layer {missing[0]} does not exist; the model has attention in layers {some}")
    if not found:
        raise InputError("no layer is chosen: name at least one")
    return sorted(set(found.values()))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The registered attention function."""
    eager = _eager(module)
    if eager is None:
        raise _unsupported(module)
    output, probabilities = eager(module, query, key, value, attention_mask, **kwargs)
    if (transform := _TRANSFORMS.get(module)) is not None:
        with maybe_autocast(output.device.type, enabled=False):  # a transform chooses its own precision
            output = transform(output, probabilities, value)
    return output, probabilities


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The eager attention function of the file that the module's class (or one of its bases) comes from."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((f for file in files if (f := getattr(file, "eager_attention_forward", None))), None)


def _numbered(model: nn.Module) -> dict[nn.Module, int]:
    """The modules that carry a layer number: attention, and in some families others too."""
    numbers = {module: getattr(module, "layer_idx", None) for module in model.modules()}
    return {module: number for module, number in numbers.items() if isinstance(number, int)}


def _unsupported(model: nn.Module) -> InputError:
    return InputError(
        f"{type(model).__name__} does not use the attention interface of transformers, so its attention cannot be "
        "replaced; choose another architecture (GPT-2, Llama, OLMo-2, Qwen3 and most others do)"
    )


def _implementation(model: "PreTrainedModel") -> dict[str, str]:
    """What is set now, for ``set_attn_implementation``: of the model, and of its parts that have their own config."""
    config = model.config
    parts = {key: getattr(config, key) for key in config.sub_configs}
    own = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **own}


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
