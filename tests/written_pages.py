"""What docs pages say of the code, written from the code: options of every command, formulas with their sources.

``make docs`` runs ``python -m tests.written_pages``; ``tests/test_docs.py`` compares.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.commands import command_names, summary
from lightning_kfac.cli.edit import make_parser
from lightning_kfac.cli.overview import TRAINING
from lightning_kfac.cli.train import Parser
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.modules.causal_lm import CausalLM
from lightning_kfac.modules.text_data import TextData

DOCS = Path(__file__).parents[1] / "docs"
BEGIN = "<!-- What follows is written by `make docs`. -->\n"
SECTIONS = {"model": CausalLM, "data": TextData, "collect": CurvatureCollector, "edit": EditConfig}
Row = tuple[str, str, str]


def commands() -> str:
    """Every command with its options; those of texts and measures that several have stand once, under ``fit``."""
    shared = [row for name in SECTIONS for row in _rows(_section(name))]
    parts = [f"## {', '.join(TRAINING)}\n", *(f"`{name}`: {text}\n" for name, text in TRAINING.items())]
    parts += [f"### Options of {name}\n\n{_table(_rows(_section(name)))}" for name in SECTIONS]
    for name in command_names():
        rows = list(_rows(_parser_of(name)))
        own = [row for row in rows if row not in shared]
        left = sorted({row[0].partition(".")[0].strip("`-") for row in rows if row in shared})
        also = "".join(f"\nOptions of [{section}](#options-of-{section}) too.\n" for section in left)
        parts.append(f"## {name}\n\n{summary(name)}\n\n{_table(own)}{also}")
    return "\n".join(parts)


def formulas() -> str:
    """Name, importance, need and source of every formula."""
    lines = ["| formula | importance S_ij | needs | source |", "|---|---|---|---|"]
    for record in FORMULAS.values():
        needs = ", ".join(f"`collect.{need}`" for need in record.needs)
        lines.append(f"| `{record.name}` | {_cell(record.text)} | {needs} | {_cell(record.source)} |")
    return "\n".join(lines) + "\n"


PAGES = {"commands.md": commands, "formulas.md": formulas}


def written(page: str) -> str:
    """The page as it must be: what stands above the mark, and what follows from the code."""
    kept = (DOCS / page).read_text("utf-8").partition(BEGIN)[0]
    return f"{kept}{BEGIN}\n{PAGES[page]()}"


def _section(name: str) -> ArgumentParser:
    parser = Parser()
    if name in ("model", "data"):
        parser.add_lightning_class_args(SECTIONS[name], name)
    else:
        parser.add_class_arguments(SECTIONS[name], name)
    return parser


def _parser_of(command: str) -> ArgumentParser:
    (commands_of,) = (
        action for action in make_parser([command])._actions if isinstance(action, argparse._SubParsersAction)
    )
    return commands_of._name_parser_map[command]


def _rows(parser: ArgumentParser) -> Iterator[Row]:
    """Options, defaults and help, but for those that every command has."""
    for action in parser._actions:
        names = [name for name in action.option_strings if not name.endswith("+")] or [action.dest.upper()]
        if action.dest in ("help", "config", "print_config") or argparse.SUPPRESS in (action.help, action.default):
            continue
        yield f"`{names[-1]}`", _default(action), _cell(action.help or "")


def _default(action: argparse.Action) -> str:
    if getattr(action, "required", False) and action.default is None:
        return "required"
    value = getattr(action.default, "__dict__", action.default) if action.default is not None else None
    return "" if value is None else f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|").replace("<", "&lt;").strip()


def _table(rows: Iterable[Row]) -> str:
    lines: Sequence[str] = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *lines]) + "\n" if lines else ""


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(written(page), "utf-8")
