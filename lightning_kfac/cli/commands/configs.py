"""List the configs that come with the package, or print one."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.shipped import shipped
from lightning_kfac.console import command_line, filled
from lightning_kfac.errors import InputError

PRINTS = True


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("name", type=str, nargs="?", help="The one to print, such as quickstart.")


def run(options: Namespace) -> None:
    """Prints."""
    files = shipped()
    if options.name is None:
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(filled(_about(path), f"{name:<{width}}  "))
    elif (name := options.name.removesuffix(".yaml")) in files:
        print(files[name].read_text("utf-8"), end="")
    else:
        raise InputError(f"{options.name}: no such config; `{command_line('configs')}` lists them")


def _about(path: Path) -> str:
    """The first line of a file that is a comment."""
    lines = path.read_text("utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")
