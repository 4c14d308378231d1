"""List the configs that come with the package, print one, or tell what a config would run."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.foreign_code import foreign_code
from lightning_kfac.cli.shipped import find_config, shipped
from lightning_kfac.console import command_line, console, filled
from lightning_kfac.errors import InputError

PRINTS = True


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("name", type=str, nargs="?", help="The one to print, such as quickstart.")
    parser.add_argument(
        "--explain",
        type=str | None,
        help="A config from elsewhere, which is code: list the classes, functions and switches that it names, in files "
        "that it names too; nothing is imported or run.",
    )


def run(options: Namespace) -> None:
    """Prints."""
    if options.explain is not None:
        _explain(Path(find_config(options.explain)))
        return
    files = shipped()
    if options.name is None:
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(filled(_about(path), f"{name:<{width}}  "))
    elif (name := options.name.removesuffix(".yaml")) in files:
        print(files[name].read_text("utf-8"), end="")
    else:
        raise InputError(f"{options.name}: no such config; `{command_line('configs')}` lists them")


def _explain(path: Path) -> None:
    found = foreign_code(path)
    if not found:
        console.print(f"{path}: names no class, no function and no switch that runs other code than lightning_kfac's")
        return
    console.print(f"{path} would run or change, beside lightning_kfac's own code:")
    console.print(*(f"  {line}" for line in found), sep="\n")


def _about(path: Path) -> str:
    """The first line of a file that is a comment."""
    lines = path.read_text("utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")
