"""Which task a run of ``fit`` is of: known before its options, which are those of the task's module and data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.storage.yaml_files import read_yaml

TEXT, IMAGES = "text", "images"
TASKS = (TEXT, IMAGES)
TASK_OPTION = "--task"
TASK_HELP = "Language modelling, or images with wrong labels (docs/images.md), whose model and data have other options."
CONFIG_OPTIONS = ("--config", "-c")


def task_named(words: Sequence[str]) -> str:
    """The last task that a command line names, in its options or in a config file.

    Args:
        words: With the paths of configs.

    Raises:
        InputError: There is no such task.

    Example:
        >>> task_named(["fit", "--task", "images"]), task_named(["fit"])
        ('images', 'text')
    """
    task: Any = TEXT
    for option, value in zip(words, [*words[1:], ""], strict=True):
        name, equals, rest = option.partition("=")
        given = rest if equals else value
        if name == TASK_OPTION:
            task = given
        elif name in CONFIG_OPTIONS:
            task = _in_config(Path(given)) or task
    if task not in TASKS:
        raise InputError(f"task is {task!r}; choose {' or '.join(TASKS)}")
    return str(task)


def _in_config(path: Path) -> Any:
    """What a config says of its task; None where it says nothing, or is no file, which is said where it is read."""
    found = read_yaml(path) if path.is_file() else None
    if not isinstance(found, dict):
        return None
    inside = found.get("fit")
    return found.get("task") or (inside.get("task") if isinstance(inside, dict) else None)
