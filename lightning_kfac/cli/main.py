"""The one command: it imports what the subcommand needs, and nothing before it is known."""

import sys

import lightning_kfac
from lightning_kfac.cli.commands import command_names
from lightning_kfac.cli.overview import overview
from lightning_kfac.cli.shipped import with_config_paths
from lightning_kfac.console import OF_TRAIN, say_error
from lightning_kfac.errors import InputError, did_you_mean
from lightning_kfac.garbage import imports


def main(args: list[str] | None = None) -> None:
    """Runs a subcommand, or lists them all.

    Args:
        args: By default what the user typed.
    """
    words = sys.argv[1:] if args is None else args
    if words in ([], ["-h"], ["--help"]):
        print(overview())
    elif words == ["--version"]:
        print(lightning_kfac.__version__)
    elif words[0] in command_names():
        with imports():
            from lightning_kfac.cli.edit import main as run

        run(words)
    elif any(word in OF_TRAIN for word in words):  # a config of several subcommands may stand before one
        try:
            with_config_paths(list(words))  # before the imports, which take seconds
        except InputError as error:
            say_error(f"error: {error}")
            raise SystemExit(2) from None
        with imports():
            from lightning_kfac.cli.train import main as run

        run(words)
    else:
        known = [*OF_TRAIN, *command_names()]
        meant = did_you_mean(words[0], known) or f"; choose from {', '.join(known)}"
        say_error(f"error: {words[0]}: no such command{meant}")
        raise SystemExit(2)
