"""The commands of ``edit.py``, one a module: a docstring, ``add_options`` and ``run``."""

from lightning_kfac.commands import apply, import_factors, inspect, push, restore, sweep

COMMANDS = {
    "apply": apply,
    "sweep": sweep,
    "inspect": inspect,
    "import": import_factors,
    "restore": restore,
    "push": push,
}
