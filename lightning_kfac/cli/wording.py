"""What the parser says, in one plain sentence that names what was probably meant."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from typing import Any, get_args

from jsonargparse import ArgumentParser

from lightning_kfac.errors import did_you_mean

UNKNOWN_WORDS = re.compile(r"unrecognized arguments: (.*)")
AMBIGUOUS = re.compile(r"ambiguous option: (\S+) could match")
UNKNOWN_KEY = re.compile(
    r"(?:.* does not accept (?:nested key|option)|Option|Key) '([^']+)'(?: is not (?:accepted|expected))?"
)
NO_CHOICE = re.compile(r"Parser key \"([^\"]+)\": Expected a typing\.Literal\[(.*)\]\. Got value: (.*)")
NO_TYPE = re.compile(
    r"Parser key \"([^\"]+)\": Does not validate against any of the Union subtypes Subtypes: (.*) Errors: .*"
    r" Given value: (.*)"
)
TYPES = re.compile(r"<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\]|([\w.]+(?:\[.*?\])?)")


def reworded(message: str, parser: ArgumentParser) -> str:
    """A message of the parser for people who have never seen its classes; others stay as they are.

    Args:
        message: On one line.
        parser: Knows the options.
    """
    if found := UNKNOWN_WORDS.fullmatch(message):
        return _unknown_words(shlex.split(found[1]) if found[1].count("'") % 2 == 0 else found[1].split(), parser)
    if found := AMBIGUOUS.match(message):
        return _unknown_words([found[1]], parser)
    if found := UNKNOWN_KEY.fullmatch(message):
        return f"unknown key {found[1]}{did_you_mean(found[1], known_keys(parser))}"
    if found := NO_CHOICE.fullmatch(message):
        choices = [choice.strip("' ") for choice in found[2].split(",")]
        return f"{found[1]}: {found[3]!r} is none of {', '.join(choices)}{did_you_mean(found[3], choices)}"
    if found := NO_TYPE.fullmatch(message):
        return f"{found[1]}: {found[3]!r} cannot be used; it takes {_types(found[2])}"
    return message


def _unknown_words(words: list[str], parser: ArgumentParser) -> str:
    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{word}: what is this? Options begin with --, as in --config {word}"
    options = {option for action in _actions(parser) for option in action.option_strings if option.startswith("--")}
    return f"unknown option {word}{did_you_mean(word, options)}"


def known_keys(parser: ArgumentParser) -> set[str]:
    """Dotted names of all options, and the last parts of those that only a class knows."""
    keys: set[str] = set()
    for action in _actions(parser):
        keys.add(action.dest)
        keys.update(_fields(getattr(action, "_typehint", None)))
    return keys


def _actions(parser: ArgumentParser) -> Iterator[Any]:
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):  # commands below this one
            for below in action.choices.values():
                yield from _actions(below)


def _fields(hint: Any) -> Iterator[str]:
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                yield field.name
                yield from _fields(field.type)


def _types(text: str) -> str:
    """The subtypes of a union in words.

    Example:
        >>> _types("[<class 'int'>, <class 'NoneType'>]"), _types("[typing.Literal['all'], list[int]]")
        ('int or null', 'all or list of int')
    """
    names: list[str] = []
    for plain, literal, other in TYPES.findall(text.removeprefix("[").removesuffix("]")):
        name = plain or literal.replace("'", "") or other
        name = re.sub(r"(?:[\w.]*\.)?(?:Sequence|list|List)\[(.*)\]", r"list of \1", name)
        name = re.sub(r"(?:[\w.]*\.)?(?:Mapping|dict|Dict)\[.*\]", "mapping", name)
        names.append(name.replace("NoneType", "null").replace("str", "text"))
    return " or ".join(dict.fromkeys(names))
