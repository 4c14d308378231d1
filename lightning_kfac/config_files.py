"""Config files are looked at before a parser expands them: aliases and depth can exhaust memory and stack."""

import itertools
import stat
from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_kfac.errors import InputError

LARGEST_FILE = 1 << 20  # bytes
LARGEST = 100_000  # values, once aliases are written out
DEEPEST = 100
SUFFIXES = (".yaml", ".yml")


def check_config_files(args: Sequence[str]) -> None:
    """Checks the config files that a command line names, and values on it that are written like one.

    Raises:
        InputError: A file cannot be read, is no YAML, or would be too large or deep in memory.
    """
    for flag, value in itertools.pairwise([*args, ""]):
        path = value if flag in ("--config", "-c") else flag.partition("--config=")[2]
        word = flag.partition("=")[2] or flag
        if path or (word.endswith(SUFFIXES) and Path(word).is_file()):
            _check_file(Path(path or word))
        elif sum(map(word.count, "[{")) > DEEPEST:
            check_yaml(word, flag[:40])


def _check_file(path: Path) -> None:
    try:
        about = path.stat()
        if stat.S_ISREG(about.st_mode) and about.st_size > LARGEST_FILE:
            raise InputError(f"{path}: too large for a config file ({about.st_size:,} bytes)")
        if not stat.S_ISFIFO(about.st_mode):  # what comes through a pipe can be read once
            check_yaml(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def check_yaml(text: str, where: str) -> None:
    """Raises ``InputError`` for text that is no YAML, or too large or deep once its aliases are written out.

    Example:
        >>> check_yaml("edit: {rho: 0.7}", "a.yaml")
        >>> check_yaml("a: &a [*a]", "a.yaml")
        Traceback (most recent call last):
        lightning_kfac.errors.InputError: a.yaml: not valid YAML: nested too deeply, or an alias that contains itself
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _size(root, {}, 0) if root is not None else 0
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply, or an alias that contains itself") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if size > LARGEST:
        raise InputError(f"{where}: too large for a config file: {size:,} values once its aliases are written out")


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Number of values below a node; a node under several aliases is looked at once."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.SequenceNode) else itertools.chain.from_iterable(node.value)
        known[id(node)] = 1 + sum(_size(child, known, depth + 1) for child in children)
    return min(known[id(node)], 10**12)
