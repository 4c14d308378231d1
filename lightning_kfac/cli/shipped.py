"""The config files that come with the package, by name."""

from pathlib import Path

import lightning_kfac
from lightning_kfac.console import command_line
from lightning_kfac.errors import InputError, did_you_mean

PACKAGE = Path(lightning_kfac.__file__).parent
# In a wheel they lie in the package, in a clone beside it.
PLACES = (PACKAGE / "configs", PACKAGE.parent / "configs")
SUFFIX = ".yaml"
OPTIONS = ("--config", "-c")


def shipped() -> dict[str, Path]:
    """Files by name: ``quickstart`` for ``quickstart.yaml``, ``cluster/collect.sbatch`` for what is no config."""
    folder = next((place for place in PLACES if place.is_dir()), PLACES[0])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix().removesuffix(SUFFIX): path for path in files}


def find_config(name: str) -> str:
    """The path of a config: a file that exists, or else one that comes with the package.

    Args:
        name: A path, ``quickstart``, ``quickstart.yaml`` or, as in a clone, ``configs/quickstart.yaml``.

    Raises:
        InputError: It has no folder, so it looks like the name of one that comes along, and none has it.

    Example:
        >>> from pathlib import Path
        >>> Path(find_config("quickstart")).name, find_config("mine/own.yaml")
        ('quickstart.yaml', 'mine/own.yaml')
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return name
    found = shipped().get(path.as_posix().removeprefix("configs/").removesuffix(SUFFIX))
    if found is not None:
        return str(found)
    if path.name == name:
        meant = did_you_mean(path.stem, shipped())
        raise InputError(
            f"{name}: cannot be read: there is no such file, and no config of this name comes with the package"
            + (meant or f"; `{command_line('configs')}` lists those that do")
        )
    return name


def with_config_paths(words: list[str]) -> list[str]:
    """A command line in which every config is a path, also one that stands alone behind the command.

    Example:
        >>> with_config_paths(["fit", "mine/own.yaml", "--save", "none"])
        ['fit', '--config', 'mine/own.yaml', '--save', 'none']
        >>> with_config_paths(["configs", "quickstart.yaml"])
        ['configs', 'quickstart.yaml']
    """
    changed = list(words)
    if len(words) > 1 and words[0] not in ("configs", *OPTIONS) and words[1].endswith((SUFFIX, ".yml")):
        changed.insert(1, OPTIONS[0])
        words = list(changed)
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in OPTIONS:
            continue
        if equals:
            changed[number] = f"{option}={find_config(value)}"
        elif number + 1 < len(words):
            changed[number + 1] = find_config(words[number + 1])
    return changed
