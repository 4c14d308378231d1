"""The commands of ``edit.py``, one a module: a docstring, ``add_options`` and ``run``."""

from lightning_kfac.cli.commands import apply, bands, import_factors, inspect, plan, push, report, restore, scan, sweep

COMMANDS = {
    "apply": apply,
    "sweep": sweep,
    "inspect": inspect,
    "bands": bands,
    "scan": scan,
    "report": report,
    "import": import_factors,
    "restore": restore,
    "push": push,
    "plan": plan,
}
