"""What the commands in ``commands/`` share: they need saved factors or less, and no collection."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.commands import command_names, load_command, summary
from lightning_kfac.cli.figures_out import (
    OPTION,
    RETURNED,
    add_json_option,
    figures_in,
    print_figures,
    said_elsewhere,
)
from lightning_kfac.cli.foreign_code import announce_code
from lightning_kfac.cli.parsers import InputErrors, usage, with_underscores
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.shipped import with_config_paths
from lightning_kfac.console import command_line, console, format_seconds, say_error
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import disk_error, new_file, timestamp
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.run_folder import CONFIG, STATUS, RunFolder
from lightning_kfac.storage.yaml_files import check_config_files


def make_parser(names: Sequence[str] | None = None) -> ArgumentParser:
    """Commands with their options; by default all.

    Args:
        names: Of the commands to import.
    """
    parser = InputErrors(description="Edit models with saved curvature factors.")
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name in command_names() if names is None else names:
        own = _own_parser(name)
        commands.add_subcommand(name, own, help=own.description)
    return parser


def _own_parser(name: str) -> ArgumentParser:
    parser = InputErrors(description=summary(name))
    parser.add_argument("--config", action="config", help="YAML file with options by their names.")
    load_command(name).add_options(parser)
    if getattr(load_command(name), "FIGURES", None):
        add_json_option(parser)
    places = [action for action in parser._actions if not action.option_strings]
    shown = [f"[{place.dest.upper()}]" if place.nargs == "?" else place.dest.upper() for place in places]
    parser.usage = usage(name, *shown, "[--config CONFIG]")
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends in one line and exit code 2, what a command finds in its own."""
    quiet()
    begin = time.monotonic()
    typed = sys.argv[1:] if args is None else args
    try:
        words = with_config_paths(with_underscores(typed))
        check_config_files(words)
        announce_code(words)
        settings = make_parser([name for name in words[:1] if name in command_names()] or None).parse_args(words)
        name = settings.subcommand
        status = _run(name, settings[name], typed)
    except InputError as error:
        say_error(f"error: {error.with_options()}")
        raise SystemExit(2) from None
    except OSError as error:
        if (said := disk_error(error)) is None:
            raise
        say_error(f"error: {said}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say_error("stopped; what was measured or written is kept")
        raise SystemExit(130) from None
    if not getattr(load_command(name), "PRINTS", False) and not settings[name].get(OPTION):
        console.print(f"{name} took {format_seconds(time.monotonic() - begin)}")
    if status:
        raise SystemExit(status)


def _run(name: str, options: Namespace, typed: Sequence[str]) -> int | None:
    """Runs a command; gives its exit status, where it has one."""
    command = load_command(name)
    _check_output(options.get("output"))
    outputs = getattr(command, "OUTPUTS", None)
    figures = getattr(command, "FIGURES", None)
    asked = bool(figures and options.json)
    place = RunFolder(options.output, name, outputs, "output").opened() if outputs else nullcontext()
    with said_elsewhere(asked), place:
        found = command.run(options)
        if getattr(command, "NOTED", False):
            _note(name, options, typed)
    if asked:
        print_figures(found if figures == RETURNED else figures_in(Path(options.output) / str(figures)))
    return found if isinstance(found, int) else None


def _check_output(output: str | None) -> None:
    """Raises ``InputError`` for what is no path: ``Path`` would make a folder ``http:`` of an address."""
    if output == "":
        raise InputError("--output is empty; name a path")
    if output is not None and "://" in output:
        raise InputError(f"--output {output}: an address; outputs are local")


def _note(name: str, options: Namespace, typed: Sequence[str]) -> None:
    """Beside the results: the command, and all options as a config file."""
    folder = Path(options.output)
    with new_file(folder / CONFIG) as file:
        file.write_text(_own_parser(name).dump(options, skip_validation=True), "utf-8")
    about = {"status": "finished", "command": command_line(*typed), "finished": timestamp()}
    write_json(folder / STATUS, about | {"version": version("lightning-kfac")}, checksum=False)
