"""A model's own attention with something done to its output, through the attention interface of transformers.

The registered function calls the eager attention of the model's own file, so masks, soft caps, sliding windows and
sinks are the model's. So is the dtype of the probabilities: in bfloat16, eager attention rounds them after a float32
softmax, and more of them are equal. Nothing is written onto the model's modules.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.utils.generic import maybe_autocast

from lightning_kfac.errors import InputError

NAME = "lightning_kfac"
# Given the output [B, T, H, d], the probabilities [B, H, T, S] and the values [B, K, S, d]: the output to use.
Transform = Callable[[Tensor, Tensor, Tensor], Tensor]
_TRANSFORMS: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()


@contextmanager
def transformed_attention(model: nn.Module, transforms: Mapping[int, Transform]) -> Iterator[None]:
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
    modules = [module for module in model.modules() if getattr(module, "layer_idx", None) in transforms]
    outer = {module: _TRANSFORMS[module] for module in modules if module in _TRANSFORMS}
    try:
        model.set_attn_implementation(NAME)
        _TRANSFORMS.update({module: transforms[module.layer_idx] for module in modules})
        yield
    finally:
        for module in modules:
            _TRANSFORMS.pop(module, None)
        _TRANSFORMS.update(outer)
        model.set_attn_implementation(before)


@torch.no_grad()
def attention_shapes(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Number of query heads and width of a head of every attention layer, by layer number.

    Found out by running two tokens, which costs nothing on the meta device.

    Raises:
        InputError: The architecture does not support the attention interface.
    """
    shapes = {}

    def remember(layer: int) -> Transform:
        def listen(output: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
            shapes[layer] = tuple(output.shape[-2:])
            return output

        return listen

    with transformed_attention(model, {m.layer_idx: remember(m.layer_idx) for m in _numbered(model)}):
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
    existing, layers = sorted(existing), list(layers)
    found = {layer: layer + existing[-1] + 1 if layer < 0 else layer for layer in layers}
    if missing := [layer for layer, number in found.items() if number not in existing]:
        known = f"{existing[0]} to {existing[-1]}" if len(existing) > 2 else " and ".join(map(str, existing))
        raise InputError(f"layer {missing[0]} does not exist; the model has attention in layers {known}")
    if not layers:
        raise InputError("no layer is chosen: name at least one")
    return sorted(set(found.values()))


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    """The registered attention function."""
    output, probabilities = _eager(module)(module, query, key, value, attention_mask, **kwargs)
    if (transform := _TRANSFORMS.get(module)) is not None:
        with maybe_autocast(output.device.type, enabled=False):  # a transform chooses its own precision
            output = transform(output, probabilities, value)
    return output, probabilities


def _eager(module: nn.Module) -> Callable | None:
    """The eager attention function of the file that the module's class (or one of its bases) comes from."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((f for file in files if (f := getattr(file, "eager_attention_forward", None))), None)


def _numbered(model: nn.Module) -> list[nn.Module]:
    """The modules that carry a layer number: attention, and in some families others too."""
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def _unsupported(model: nn.Module) -> InputError:
    return InputError(
        f"{type(model).__name__} does not use the attention interface of transformers, so its attention cannot be "
        "replaced; choose another architecture (GPT-2, Llama, OLMo-2, Qwen3 and most others do)"
    )


def _implementation(model: nn.Module) -> dict[str, str]:
    """What is set now, for ``set_attn_implementation``: of the model, and of its parts that have their own config."""
    config = model.config
    parts = {key: part._attn_implementation for key in config.sub_configs if (part := getattr(config, key)) is not None}
    return {"": config._attn_implementation, **parts}


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
