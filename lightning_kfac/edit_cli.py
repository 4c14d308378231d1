"""The command line of ``edit.py``: everything that needs saved factors and no collection."""

import sys
import time

from jsonargparse import ArgumentParser

from lightning_kfac.cli import InputErrors, quiet
from lightning_kfac.commands import COMMANDS
from lightning_kfac.errors import InputError
from lightning_kfac.progress import console, format_seconds


class Parser(InputErrors, ArgumentParser):
    """Prints what is wrong in one line."""


def make_parser() -> ArgumentParser:
    """All commands with their options."""
    parser = Parser(prog="edit.py", description="Edit models with saved curvature factors.")
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.__doc__.strip().splitlines()[0]
        own = Parser(description=text, usage=f"python edit.py {name} [--config FILE] [--OPTION VALUE ...]")
        own.add_argument("--config", action="config", help="YAML file with options by their names.")
        command.add_options(own)
        commands.add_subcommand(name, own, help=text)
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends in one line and exit code 2."""
    quiet()
    settings = make_parser().parse_args(_with_underscores(sys.argv[1:] if args is None else args))
    begin = time.monotonic()
    try:
        COMMANDS[settings.subcommand].run(settings[settings.subcommand])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was measured or written is kept", file=sys.stderr)
        raise SystemExit(130) from None
    console.print(f"{settings.subcommand} took {format_seconds(time.monotonic() - begin)}")


def _with_underscores(args: list[str]) -> list[str]:
    """``--dry-run`` and ``--dry_run`` are the same option."""
    changed = []
    for word in args:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            option, dot, key = name[2:].partition(".")  # what follows is a name that the user gave
            name = "--" + option.replace("-", "_") + dot + key
        changed.append(name + equals + value)
    return changed
