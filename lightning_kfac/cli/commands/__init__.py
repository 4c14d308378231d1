"""The commands beside fit, validate and predict: one module each, which is found by its name, and nothing else.

A module has a docstring, whose first line is its help, and two functions: ``add_options(parser)`` and ``run(options)``,
which may give an exit status.
Four facts can be stated in it:

- ``NOTED = True``: the command and its settings are written beside its results in ``--output``.
- ``OUTPUTS = (...)``: names of what it writes into ``--output``, where it goes on with what an earlier call began; the
  folder is a run's (``storage/run_folder.py``). Other outputs are written as a whole (``options.output_folder``).
- ``FIGURES``: where its figures are, for ``--json`` (``cli/figures_out.py``).
- ``PRINTS = True``: what it prints goes into a file or a pipe, so nothing is added to it.
"""

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from lightning_kfac.garbage import imports


@cache
def _modules() -> dict[str, str]:
    """Modules by command, which is what stands before ``_``: no module can be named ``import``."""
    return {module.name.partition("_")[0]: module.name for module in pkgutil.iter_modules(__path__)}


def command_names() -> tuple[str, ...]:
    """All commands, from their files alone."""
    return tuple(_modules())


def summary(command: str) -> str:
    """The first line of a command's docstring; the module is read, not imported.

    Example:
        >>> summary("push")
        'Upload factors, an edited model or a patch to the Hugging Face hub.'
    """
    source = Path(__path__[0], f"{_modules()[command]}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def load_command(command: str) -> ModuleType:
    """Imports the module of a command."""
    with imports():
        return importlib.import_module(f"{__name__}.{_modules()[command]}")
