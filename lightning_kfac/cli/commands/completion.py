"""Print a script that completes commands, options and config names in bash or zsh."""

import importlib
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.commands import command_names
from lightning_kfac.cli.shipped import shipped
from lightning_kfac.console import OF_TRAIN

PRINTS = True
SCRIPT = """# {program} completion {shell} > FILE, and source FILE from your shell's start file.
{start}_lightning_kfac() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    if [ "$before" = "--config" ]; then
        COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -F _lightning_kfac {program}
"""


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("shell", type=Literal["bash", "zsh"], help="For which the script is.")


def run(options: Namespace) -> None:
    """Prints."""
    commands = [*OF_TRAIN, *command_names()]
    cases = (f'        {name}) options="{" ".join(options_of(name))}" ;;' for name in commands)
    start = "autoload -U +X bashcompinit && bashcompinit\n" if options.shell == "zsh" else ""
    configs = (name for name, path in shipped().items() if path.suffix == ".yaml")
    script = {"commands": " ".join(commands), "configs": " ".join(configs), "cases": "\n".join(cases)}
    print(SCRIPT.format(program="lightning-kfac", shell=options.shell, start=start, **script), end="")


def options_of(command: str) -> list[str]:
    """The options that a command's help names."""
    program = importlib.import_module("lightning_kfac.cli.main")  # by name: it loads this module
    said = StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        program.main([command, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[A-Za-z][\w.]*", said.getvalue())))
