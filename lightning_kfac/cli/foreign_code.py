"""What a config would run that is not this package's own, read from its text: nothing is imported."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_kfac.console import say
from lightning_kfac.errors import InputError
from lightning_kfac.storage.yaml_files import GROUPS, MOST_FILES, SUFFIXES, check_text, config_file, read_yaml

# Of the Trainer: options whose values are objects; for them and for groups of options a class may be named alone.
OBJECTS = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")
BY_SHORT_NAME = ("callbacks", "logger", "plugins")
ARGUMENTS = ("init_args", "dict_kwargs")
IMPORTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
SWITCHES = {
    ("trust_remote_code", "true"): "the model's repository runs its own code",
    ("weights_only", "false"): "a checkpoint may run code when it is read",
    ("overwrite", "true"): "a finished run in the same folder is replaced",
}


def foreign_code(path: Path) -> list[str]:
    """A line for each class, function or switch in a config, and in the files that it names.

    Raises:
        InputError: A file cannot be read, is no YAML, or is too large or deep.
    """
    return list(dict.fromkeys(_in_file(path, (), [])))


def announce_code(words: Sequence[str]) -> None:
    """Says what the files on a command line run that is not this package's, before any of it runs."""
    for flag, value in itertools.pairwise([*words, ""]):
        name, _, joined = flag.partition("=")
        place = tuple(name.removeprefix("--").split("."))
        config = config_file(flag, value)
        file = Path(config) if config else _file(joined or value, place, Path())
        if file is not None and name.startswith("-"):
            lines = _in_file(file, () if config else place, [])
            if found := list(dict.fromkeys(lines)):
                say(f"note: {file} asks for other code or for changes: {'; '.join(found)}")


def _in_file(path: Path, place: tuple[str, ...], files: list[Path]) -> Iterator[str]:
    files.append(path)
    if len(files) > MOST_FILES:
        raise InputError(f"{files[0]}: names more than {MOST_FILES} files, or one that names itself; put them together")
    yield from _inside(read_yaml(path), place, path.parent, files)


def _inside(value: Any, place: tuple[str, ...], folder: Path, files: list[Path]) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _inside(child, (*place, *str(key).split(".")), folder, files)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _inside(child, (*place, str(number)), folder, files)
    elif isinstance(value, str) and (inner := _as_yaml(value)) is not None:
        yield from _inside(inner, place, folder, files)
    elif isinstance(value, str) and (file := _file(value, place, folder)) is not None:
        yield from _in_file(file, place, files)
    elif place:
        yield from _of_setting(str(value), place)


def _of_setting(value: str, place: tuple[str, ...]) -> Iterator[str]:
    where = ".".join(place)
    names_class = place[-1] == "class_path" or _is_object(place, value)
    if (place[-1], value.lower()) in SWITCHES:
        yield f"{where} {value.lower()}: {SWITCHES[place[-1], value.lower()]}"
    elif names_class:
        yield f"{where.removesuffix('.class_path')}: the class {value}"
    elif IMPORTED.fullmatch(value) and set(place) & {*ARGUMENTS, *OBJECTS}:
        yield f"{where}: {value}, which is imported where a class or a function belongs"


def _is_object(place: tuple[str, ...], value: str) -> bool:
    """Whether a value names a class where an object belongs, and is none of the Trainer's own words."""
    name = _option(place)
    short = name in BY_SHORT_NAME and value[:1].isupper() and value not in ("True", "False", "None")
    return short or (name in (*OBJECTS, *GROUPS) and IMPORTED.fullmatch(value) is not None)


def _option(place: tuple[str, ...]) -> str:
    """The option that a value belongs to, which may be one of a list."""
    return next((name for name in reversed(place) if not name.isdigit()), "")


def _as_yaml(text: str) -> Any:
    """The list or mapping that a text is, as the parser would read it; None where it is neither."""
    if not set(text) & set("[{:"):
        return None
    check_text(text, f"{text[:40]!r}...")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None
    return value if isinstance(value, dict | list) else None


def _file(text: str, place: tuple[str, ...], folder: Path) -> Path | None:
    """The file with settings that a value names, if it does."""
    may_be = text.endswith(SUFFIXES) or _option(place) in (*GROUPS, *OBJECTS, *ARGUMENTS, "config")
    file = folder / text.removeprefix("file://")
    try:
        return file if may_be and file.is_file() else None
    except (OSError, ValueError):  # too long a name, or a zero in it
        return None
