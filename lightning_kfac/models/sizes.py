"""Sizes in a model's config, looked at before anything is built from them: a number can ask for all time and memory."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_kfac.errors import InputError

# Far above any model: modules are made one by one, tensors take no memory on the meta device.
LIMITS = (
    (re.compile(r"layers$|^n_layer$|^depths?$"), 2_000),
    (re.compile(r"(heads?|experts?|blocks?|groups?|labels|stages?|codebooks?)$"), 1 << 20),
    (re.compile(r"(size|dim|rank|width|inner|embd|d_model|d_ff|positions?|embeddings|ctx)$"), 1 << 28),
)
MOST_EXPERTS = 1 << 20  # of all layers together
OF_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NEVER_ZERO = (*OF_BLOCKS, "hidden_size", "n_embd", "d_model", "vocab_size")


def check_sizes(settings: Any, where: object) -> None:
    """Raises ``InputError`` for a size that no model has; values of another type than numbers pass.

    Args:
        settings: A config as it is written, with the configs of its parts.
        where: Names it in messages.

    Example:
        >>> check_sizes({"num_hidden_layers": 10**9}, "config.json")
        Traceback (most recent call last):
        lightning_kfac.errors.InputError: config.json: num_hidden_layers is 1000000000; at most 2,000 can be built
    """
    layers = [1]
    experts = [0]
    for name, value, is_part in _numbers(settings):
        limit = next((limit for pattern, limit in LIMITS if pattern.search(name)), None)
        if limit is None:
            continue
        if value > limit:
            raise InputError(f"{where}: {name} is {_short(value)}; at most {limit:,} can be built")
        if value < -1 or (name in NEVER_ZERO and value < 1 and not is_part):
            raise InputError(f"{where}: {name} is {_short(value)}; no causal language model has less than 1")
        if name in OF_BLOCKS:
            layers.append(value)
        elif name.endswith("experts"):
            experts.append(value)
    if max(layers) * max(experts) > MOST_EXPERTS:
        raise InputError(f"{where}: {max(experts):,} experts in each of {max(layers):,} layers; they cannot be built")


def _numbers(settings: Any, name: str = "", is_part: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Whole numbers with their names; those in lists have the name of the list."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, str(key), is_part or bool(name))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _numbers(value, name, True)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield name, settings, is_part


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "a number of more than 20 digits"
