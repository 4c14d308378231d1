"""The command line of ``edit.py``: everything that needs saved factors and no collection."""

import json
import shlex
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.commands import COMMANDS
from lightning_kfac.cli.parsers import InputErrors
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.console import console, format_seconds
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import timestamp
from lightning_kfac.storage.locks import FolderLock
from lightning_kfac.storage.yaml_files import check_config_files

# Commands that measure point by point into a folder, and go on there; and all that leave their settings in one.
RESUMING = ("sweep", "scan")
NOTED = (*RESUMING, "bands")


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
    begin = time.monotonic()
    try:
        words = _with_underscores(sys.argv[1:] if args is None else args)
        check_config_files(words)
        settings = make_parser().parse_args(words)
        options = settings[settings.subcommand]
        resumes = settings.subcommand in RESUMING
        with FolderLock(options.output, "choose another --output") if resumes else nullcontext():
            COMMANDS[settings.subcommand].run(options)
            _note_command(settings, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was measured or written is kept", file=sys.stderr)
        raise SystemExit(130) from None
    console.print(f"{settings.subcommand} took {format_seconds(time.monotonic() - begin)}")


def _note_command(settings: Namespace, args: list[str] | None) -> None:
    """Beside the results of a grid or a profile: the command, and all options as a config file."""
    command, options = settings.subcommand, settings[settings.subcommand]
    if command not in NOTED:
        return
    folder, parser = Path(options.output), make_parser()._subcommands_action._name_parser_map[command]
    (folder / "config.yaml").write_text(parser.dump(options, skip_validation=True), "utf-8")
    words = shlex.join(["edit.py", *(sys.argv[1:] if args is None else args)])
    about = {"status": "finished", "command": words, "finished": timestamp(), "version": version("lightning-kfac")}
    (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


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
