"""All kinds of attacks, and how a config names one."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_kfac.attacks.asking import PromptShift, Sampling
from lightning_kfac.attacks.attack import Attack
from lightning_kfac.attacks.noise import Noise
from lightning_kfac.attacks.pruning import Pruning
from lightning_kfac.attacks.quantization import Quantization
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.errors import InputError

KINDS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (Quantization, Noise, Pruning, Sampling, PromptShift, Relearning)
}


def attack_of(value: str | Mapping[str, Any]) -> Attack:
    """The attack that a config names: its kind, or a mapping of ``name`` and settings.

    Raises:
        InputError: No such kind or setting, or a value that it cannot be.

    Example:
        >>> attack_of({"name": "noise", "norm": 0.2})
        Noise(norm=0.2, seed=0)
        >>> attack_of("quantization").label
        'int4, groups of 128'
    """
    settings: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    name = settings.pop("name", None)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(KINDS)
        raise InputError(
            f"attacks: {name!r} is no attack; choose from {known}" if name else "attacks: one has no name", "attacks"
        )
    hints = get_type_hints(kind)
    own = [field.name for field in fields(kind)]
    for key, given in settings.items():
        if key not in own:
            raise InputError(f"attacks: {name} has no setting {key!r}; it has {', '.join(own)}", "attacks")
        if not _fits(given, hints[key]):
            raise InputError(f"attacks: {name}: {key} is {given!r}; it must be {_words(hints[key])}", "attacks")
        if isinstance(given, list):
            settings[key] = tuple(given)
    return kind(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML may stand for what a dataclass declares."""
    origin = get_origin(hint)
    parts = get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _words(hint: Any) -> str:
    """What a setting may be, for a message."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of whole numbers"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    return {float: "a number", int: "a whole number", str: "text"}.get(hint, "null")
