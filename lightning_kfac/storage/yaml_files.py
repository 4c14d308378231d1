"""Config files are looked at before a parser expands them.

Aliases can fill the memory, and deep nesting ends the interpreter inside PyYAML's C parser. So everything that a parser
will read as YAML is composed here first, in Python. ``cli/parsers.py`` lets no file past ``read_config`` and no text
past ``check_text``; ``check_config_files`` finds the same faults earlier, in the files that a command line names.
"""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_kfac.errors import InputError
from lightning_kfac.storage.special_files import check_not_special

LARGEST_FILE = 1 << 20  # bytes
LARGEST = 100_000  # values, once aliases are written out
DEEPEST = 100
MOST_FILES = 100  # that a config and the files in it name
SUFFIXES = (".yaml", ".yml")
ADDRESS = re.compile(r"(?!file:)[A-Za-z][\w+.-]*://")
# Options for which the parser takes the name of any file with their fields in it.
GROUPS = ("model", "data", "collect", "edit", "crystallize", "trainer", "training", "measures", "extraction", "mining")


class _Place(NamedTuple):
    """Where a text stands.

    Attributes:
        where: Names it in messages.
        folder: Other files are named relative to it.
        files: That were looked at so far, from the first text on.
    """

    where: str
    folder: Path
    files: list[Path]


def check_config_files(args: Sequence[str]) -> None:
    """Checks the config files that a command line names, and its long values.

    Raises:
        InputError: A file cannot be read, is no YAML, or would be too large or deep in memory.
    """
    files: list[Path] = []
    for flag, value in itertools.pairwise([*args, ""]):
        place = _Place(flag[:40], Path(), files)
        if path := config_file(flag, value):
            _check_local(path)
            _check_file(Path(path), files)
        else:
            name, _, joined = flag.partition("=")
            if name.startswith("--"):
                _check_group(name.rpartition(".")[2].lstrip("-"), joined or value, place)
            _check_value(joined if name.startswith("--") else flag, place)


def config_file(flag: str, value: str) -> str:
    """The file that a word names, alone or with the next one: ``--config FILE``, ``--config=FILE``, ``-cFILE``."""
    if flag in ("--config", "-c"):
        return value
    short = flag.startswith("-c") and not flag.startswith("--")
    return flag[2:].removeprefix("=") if short else flag.partition("--config=")[2]


def check_yaml(text: str, where: str, folder: Path = Path()) -> None:
    """Raises ``InputError`` for text that is no YAML, or too large or deep once its aliases are written out.

    Args:
        where: Names the text in messages.
        folder: Other files are named relative to it.

    Example:
        >>> check_yaml("edit: {rho: 0.7}", "a.yaml")
        >>> check_yaml("a: &a [*a]", "a.yaml")
        Traceback (most recent call last):
        lightning_kfac.errors.InputError: a.yaml: not valid YAML: nested too deeply, or an alias that contains itself
    """
    _check_yaml(text, _Place(where, folder, []))


def _check_yaml(text: str, place: _Place) -> None:
    where = place.where
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _size(root, {}, 0, place) if root is not None else 0
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply, or an alias that contains itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if size > LARGEST:
        raise InputError(f"{where}: too large for a config file: {size:,} values once its aliases are written out")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, whatever its suffix.

    Raises:
        InputError: As ``check_config_files``.
    """
    text = read_config(path)
    _check_yaml(text, _Place(str(path), path.parent, [path]))
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _check_file(path: Path, files: list[Path]) -> None:
    files.append(path)
    if len(files) > MOST_FILES:  # a few small ones that name each other can make a parser read for ever
        raise InputError(f"{files[0]}: names more than {MOST_FILES} files, or one that names itself; put them together")
    _check_yaml(read_config(path), _Place(str(path), path.parent, files))


def read_config(path: Path) -> str:
    """The text of a config file.

    Raises:
        InputError: It cannot be read, is no regular file, is larger than any config, or is not UTF-8.
    """
    check_not_special(path)
    try:
        with open(path, "rb") as file:
            contents = file.read(LARGEST_FILE + 1)
        if len(contents) > LARGEST_FILE:
            raise InputError(f"{path}: too large for a config file ({path.stat().st_size:,} bytes)")
        return contents.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def _check_group(name: str, text: str, place: _Place) -> None:
    """A value of an option that has fields: it may name a file with them."""
    if name in GROUPS and text:
        _check_local(text)
        if os.path.isfile(place.folder / text):
            _check_file(place.folder / text, place.files)


def _check_local(text: str) -> None:
    """Raises ``InputError`` for an address: nothing is fetched because a config says so."""
    if ADDRESS.match(text):
        raise InputError(f"{text}: an address, not a file: fetch it, look at it, and give the file's path")


def _check_value(text: str, place: _Place) -> None:
    """A value that the parser may take for YAML, or for the name of a file with YAML; it need not be either."""
    if text.endswith(SUFFIXES) and os.path.isfile(place.folder / text):
        _check_file(place.folder / text, place.files)
    else:
        _check_text(text, place)


def check_text(text: str, where: str) -> None:
    """Raises ``InputError`` for text that would be too large or too deep if it were YAML, which it need not be.

    Args:
        where: Names the text in messages.
    """
    _check_text(text, _Place(where, Path(), []))


def _check_text(text: str, place: _Place) -> None:
    if len(text) > DEEPEST:  # a shorter one is neither
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if isinstance(root, yaml.CollectionNode) and _size(root, {}, 0, place) > LARGEST:
                raise InputError(f"{place.where}: a value is too large once its aliases are written out")
        except InputError:
            raise
        except (yaml.YAMLError, ValueError):
            return
        except RecursionError:
            raise InputError(f"{place.where}: a value is nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int], depth: int, place: _Place) -> int:
    """Number of values below a node; a node under several aliases is looked at once."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        sizes = [_size(child, known, depth + 1, place) for child in _children(node, place)]
        known[id(node)] = 1 + sum(sizes)
    return known[id(node)]


def _children(node: yaml.Node, place: _Place) -> Iterable[yaml.Node]:
    """The values of a list, the keys and values of a mapping. What may name or be another file is checked."""
    if isinstance(node, yaml.ScalarNode):
        _check_value(node.value, place)
        return ()
    if isinstance(node, yaml.SequenceNode):
        return node.value
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            _check_group(key.value, value.value, place)
    return itertools.chain.from_iterable(node.value)
