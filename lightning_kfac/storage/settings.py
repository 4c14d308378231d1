"""Records of a config: each names its kind and gives some of its settings."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_kfac.errors import InputError

Kind = TypeVar("Kind")


def record_of(kinds: Mapping[str, type[Kind]], value: str | Mapping[str, Any], option: str, what: str) -> Kind:
    """The record that a config names: its kind, or a mapping of ``name`` and settings.

    Args:
        kinds: Dataclasses by name.
        value: As YAML has it.
        option: Where it stands, for messages.
        what: What a record is, with its article.

    Raises:
        InputError: No such kind or setting, or a value that it cannot be.
    """
    settings: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    name = settings.pop("name", None)
    kind: Any = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(kinds)
        raise InputError(
            f"{option}: {name!r} is no {what}; choose from {known}" if name else f"{option}: one has no name", option
        )
    hints = get_type_hints(kind)
    own = [field.name for field in fields(kind)]
    for key, given in settings.items():
        if key not in own:
            raise InputError(f"{option}: {name} has no setting {key!r}; it has {', '.join(own)}", option)
        if not _fits(given, hints[key]):
            raise InputError(f"{option}: {name}: {key} is {given!r}; it must be {_words(hints[key])}", option)
        if isinstance(given, list):
            settings[key] = tuple(given)
    record: Kind = kind(**settings)
    return record


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
