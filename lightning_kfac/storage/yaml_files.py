"""Config files are looked at before a parser expands them.

Aliases can fill the memory, and deep nesting ends the interpreter inside PyYAML's C parser. So everything that the
parser will read as YAML is composed here first, in Python: config files, files that they name, and texts in them.
"""

import itertools
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from lightning_kfac.errors import InputError

LARGEST_FILE = 1 << 20  # bytes
LARGEST = 100_000  # values, once aliases are written out
DEEPEST = 100
SUFFIXES = (".yaml", ".yml")
# Options for which the parser takes the name of any file with their fields in it.
GROUPS = ("model", "data", "collect", "edit", "crystallize", "trainer", "training", "measures", "mining")


def check_config_files(args: Sequence[str]) -> None:
    """Checks the config files that a command line names, and its long values.

    Raises:
        InputError: A file cannot be read, is no YAML, or would be too large or deep in memory.
    """
    for flag, value in itertools.pairwise([*args, ""]):
        path = value if flag in ("--config", "-c") else flag.partition("--config=")[2]
        if path:
            _check_file(Path(path))
        else:
            name, _, joined = flag.partition("=")
            if name.startswith("--"):
                _check_group(name.rpartition(".")[2].lstrip("-"), joined or value, Path())
            _check_text(joined if name.startswith("--") else flag, flag[:40], Path())


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
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _size(root, {}, 0, where, folder) if root is not None else 0
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply, or an alias that contains itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if size > LARGEST:
        raise InputError(f"{where}: too large for a config file: {size:,} values once its aliases are written out")


def read_yaml(path: Path) -> object:
    """What a YAML file holds, whatever its suffix.

    Raises:
        InputError: As ``check_config_files``.
    """
    text = _read(path)
    check_yaml(text, str(path), path.parent)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _check_file(path: Path) -> None:
    if not path.is_fifo():  # what comes through a pipe can be read once
        check_yaml(_read(path), str(path), path.parent)


def _read(path: Path) -> str:
    try:
        about = path.stat()
        if stat.S_ISREG(about.st_mode) and about.st_size > LARGEST_FILE:
            raise InputError(f"{path}: too large for a config file ({about.st_size:,} bytes)")
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def _check_group(name: str, text: str, folder: Path) -> None:
    """A value of an option that has fields: it may name a file with them."""
    if name in GROUPS and text and os.path.isfile(folder / text):
        _check_file(folder / text)


def _check_text(text: str, where: str, folder: Path) -> None:
    """A value that the parser may take for YAML, or for the name of a file with YAML; it need not be either."""
    if text.endswith(SUFFIXES) and os.path.isfile(folder / text):
        _check_file(folder / text)
    elif len(text) > DEEPEST:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if isinstance(root, yaml.CollectionNode) and _size(root, {}, 0, where, folder) > LARGEST:
                raise InputError(f"{where}: a value is too large once its aliases are written out")
        except InputError:
            raise
        except (yaml.YAMLError, ValueError):
            return
        except RecursionError:
            raise InputError(f"{where}: a value is nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int], depth: int, where: str, folder: Path) -> int:
    """Number of values below a node; a node under several aliases is looked at once."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        sizes = [_size(child, known, depth + 1, where, folder) for child in _children(node, where, folder)]
        known[id(node)] = 1 + sum(sizes)
    return known[id(node)]


def _children(node: yaml.Node, where: str, folder: Path) -> Iterable[yaml.Node]:
    """The values of a list, the keys and values of a mapping. What may name or be another file is checked."""
    if isinstance(node, yaml.ScalarNode):
        _check_text(node.value, where, folder)
        return ()
    if isinstance(node, yaml.SequenceNode):
        return node.value
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            _check_group(key.value, value.value, folder)
    return itertools.chain.from_iterable(node.value)
