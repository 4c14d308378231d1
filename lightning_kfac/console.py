"""What the user reads: results, progress with a rate and an ETA, and commands in the way in which they type them.

Progress is a live bar on a terminal, a plain line every few seconds in a log. Text is data: whatever is printed passes
``visible``, and no console of ours knows markup.
"""

import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only  # the one that Lightning sets, without Lightning
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import override

SECONDS_BETWEEN_LINES = 10.0
SHORTEST_SHOWN = 2.0
WIDTH_OF_LOGS = 160
WIDEST = 120
# How far something is, in words: what is left of a line is for its name and the bar.
WIDTH_OF_STATE = 52
# A column of names may be folded to this width before a table is split.
NARROWEST_NAMES = 18
PROGRAM = "lightning-kfac"
# A clone's doors to it: the first for these commands, the second for all others.
TRAIN, EDIT = "train.py", "edit.py"
OF_TRAIN = ("fit", "validate", "predict")
# Controls of terminals (C0, C1), of the order of characters (bidi), and what cannot be seen or encoded.
INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: object, keep: str = "") -> str:
    """Text that acts on nothing: characters that would are written as in a Python string.

    Args:
        keep: Such characters that stay as they are: line ends where there is more than one line.

    Example:
        >>> print(visible("run[v2]\\x1b[2J"), visible("one\\ntwo"))
        run[v2]\\x1b[2J one\\ntwo
    """
    return INVISIBLE.sub(lambda found: found[0] if found[0] in keep else _written(found[0]), str(text))


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode()


def literal(text: object, style: str = "") -> Text:
    """A piece of a table in a style, with the text as it is."""
    return Text(visible(text), style)


class PlainConsole(Console):
    """A console that shows every string as it is, on one line; objects of rich keep their styles."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, highlight=False, emoji=False, **settings)

    @override
    def render_str(self, text: str, **settings: Any) -> Text:  # what rich makes of strings, also in tables
        return super().render_str(visible(text), **settings)


# Results go to the standard output, progress to the standard error.
console = PlainConsole(soft_wrap=True)
progress_console = PlainConsole(soft_wrap=True, stderr=True)


def show(table: object, legend: Sequence[str] = (), names: int = 1) -> None:
    """Prints a table so that it fits; in a log of 160 columns, or as many as ``COLUMNS`` says.

    Args:
        legend: Lines below it: what its words mean.
        names: How many columns, from the left, name a row; where a table is split every part has them.
    """
    width = None if console.is_terminal else int(os.environ.get("COLUMNS") or WIDTH_OF_LOGS)
    target = PlainConsole(width=width)
    for part in fitted(table, target.width, names) if isinstance(table, Table) else [table]:
        target.print(part)
    for line in legend:
        text = textwrap.fill(visible(line), target.width, initial_indent="  ", subsequent_indent="    ")
        target.print(Text(text, "dim"))


def fitted(table: Table, width: int, names: int = 1) -> list[Table]:
    """A table that fits into a width, whole or in parts.

    What stands in one line is never broken, but for names. Where there is no room, intervals stand below their figures;
    where that is not enough, the table is split, and the title of each further part says so.

    Args:
        table: Its columns of figures are ``no_wrap``; others may be folded.
        width: Columns of the terminal.
        names: How many columns, from the left, name a row and stand in every part.

    Example:
        >>> table = Table("layer", *(Column(f"figure {n}", no_wrap=True) for n in range(9)), title="Layers")
        >>> table.add_row("3 gate", *9 * ["0.920 [0.897, 0.940]"])
        >>> [str(part.title) for part in fitted(table, 80)]
        ['Layers', 'Layers (continued)', 'Layers (continued)']
    """
    if _needed(table) <= width:
        return [table]
    rows = [[_below(cell) for cell in row] for row in _rows_of(table)]
    if _needed(whole := _part(table, rows, range(len(table.columns)))) <= width:
        return [whole]
    parts: list[list[int]] = [[]]
    key = list(range(names))
    for number in range(names, len(table.columns)):
        if parts[-1] and _needed(_part(table, rows, [*key, *parts[-1], number])) > width:
            parts.append([])
        parts[-1].append(number)
    found = [_part(table, rows, [*key, *part]) for part in parts]
    for part in found[1:]:
        part.title = f"{table.title} (continued)" if table.title else "(continued)"
        part.title_justify = "left"
    for part in found[:-1]:
        part.caption = None
    return found


def _needed(table: Table) -> int:
    """The least width that breaks nothing but names."""
    spare = 0
    for column in table.columns:
        if not column.no_wrap:
            natural = max(map(_width, [column.header, *column.cells]))
            spare += max(0, natural - max(column.min_width or 0, NARROWEST_NAMES))
    return PlainConsole(width=100_000).measure(table).maximum - spare


def _width(cell: Any) -> int:
    return max((cell_len(line) for line in str(cell).splitlines()), default=0)


def _rows_of(table: Table) -> list[list[Any]]:
    """The cells of each row."""
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def _below(cell: Any) -> Any:
    """The same with the interval below the figure: ``0.92 [0.90, 0.94]``."""
    figure, bracket, _ = str(cell).partition(" [")
    if not (bracket and isinstance(cell, Text)):
        return cell
    return Text("\n").join([cell[: len(figure)], cell[len(figure) + 1 :]])


def _part(table: Table, rows: Sequence[Sequence[Any]], chosen: Sequence[int]) -> Table:
    """The same table with some of its columns, and little space between them."""
    columns = [table.columns[number].copy() for number in chosen]
    part = Table(*columns, box=table.box, title=table.title, caption=table.caption, padding=(0, 1, 0, 0))
    part.title_justify = table.title_justify
    part.caption_justify = table.caption_justify
    for row, about in zip(rows, table.rows, strict=True):
        part.add_row(*(row[number] for number in chosen), end_section=about.end_section)
    return part


def counted(count: int, name: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "text"), counted(1200, "text")
        ('1 text', '1,200 texts')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def say_error(message: str) -> None:
    """Tells the user on one line, from any rank, why the program ends."""
    print(visible(message), file=sys.stderr, flush=True)


def columns() -> int:
    """The width of help texts: that of the terminal, within reason."""
    return min(shutil.get_terminal_size().columns, WIDEST)


def filled(text: str, start: str = "") -> str:
    """Text in lines as wide as the terminal; all but the first are indented by the width of what they start with."""
    return textwrap.fill(
        text, columns(), initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def say(text: str) -> None:
    """Tells the user something that is no result; on rank 0 only."""
    if _speaks():
        progress_console.print(text)


def _speaks() -> bool:
    return getattr(rank_zero_only, "rank", 0) in (None, 0)


def command_line(command: str = "", *words: object, launcher: Sequence[object] = ()) -> str:
    """A command as this user types it, who called ``lightning-kfac``, ``python -m lightning_kfac`` or a clone's script.

    Args:
        command: ``fit``, ``apply``, or nothing for the program alone.
        words: What follows; quoted where a shell needs it.
        launcher: What starts it instead of Python: ``torchrun`` and its options.

    Example:
        >>> command_line("validate", "--model.model_name", "my model")
        "python train.py validate --model.model_name 'my model'"
    """
    return shlex.join(map(str, [*_program(command, launcher), *filter(None, [command]), *words]))


def _program(command: str, launcher: Sequence[object]) -> Sequence[object]:
    called = Path(sys.argv[0])
    if called.stem == PROGRAM and not launcher:
        return [PROGRAM]
    launcher = launcher or ["torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "python"]
    if called.stem == PROGRAM or called.parts[-2:] == ("lightning_kfac", "__main__.py"):
        return [*launcher, "-m", "lightning_kfac"]
    if called.name not in (TRAIN, EDIT):
        called = Path(EDIT)
    if command.isalpha():  # neither nothing nor an option
        called = called.with_name(TRAIN if command in OF_TRAIN else EDIT)
    return [*launcher, called]


class DoneColumn(ProgressColumn):
    """How much is done, how fast, and how long it takes."""

    @override
    def render(self, task: Task) -> Text:
        elapsed = (task.finished_time if task.finished else task.elapsed) or 0.0
        unit = task.fields["unit"]
        state = _state(task.completed, task.total, unit, elapsed, task.fields["begun_at"]).replace(f" {unit}/s", "/s")
        return Text(f"{state}, done" if task.fields["closed"] else state)


@contextmanager
def track_count(
    description: str, unit: str, total: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Shows progress while the block runs; yields a function that takes the number of units done.

    Only rank 0 shows anything. ``done`` units are there already, and count in no rate. A block that ends without an
    error is shown as done.

    Args:
        unit: In the plural.

    Example:
        >>> with track_count("count", "numbers", total=3) as advance_to:
        ...     for i in range(3):
        ...         advance_to(i + 1)  # doctest: +SKIP
    """
    if not _speaks():
        yield lambda done: None
    elif progress_console.is_terminal:
        with _bar() as bar:
            name = textwrap.shorten(
                visible(description), max(12, progress_console.width - WIDTH_OF_STATE), placeholder="…"
            )
            task = bar.add_task(name, total=total, completed=done, unit=unit, begun_at=done, closed=False)
            yield lambda done: bar.update(task, completed=done)
            bar.update(task, total=total or bar.tasks[0].completed, closed=True)
    else:
        lines = _Lines(description, unit, total, done)
        yield lines.advance_to
        lines.close()


def _bar() -> Progress:
    """One line; where it is short the bar gives way first."""
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),
        DoneColumn(table_column=Column(no_wrap=True)),
        console=progress_console,
        expand=True,
    )


class _Lines:
    """Progress in a log: a line now and then, and one at the end of what took a while."""

    def __init__(self, description: str, unit: str, total: int | None, begun_at: int):
        self.start = self.printed = time.monotonic()
        self.about = description, unit, total, begun_at
        self.done = begun_at

    def advance_to(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if done != self.about[2] and now - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = now
            self._print("")

    def close(self) -> None:
        if time.monotonic() - self.start > SHORTEST_SHOWN:
            self._print(", done")

    def _print(self, end: str) -> None:
        description, unit, total, begun_at = self.about
        state = _state(self.done, total, unit, time.monotonic() - self.start, begun_at)
        progress_console.print(f"{description}: {state}{end}")


def _state(done: float, total: float | None, unit: str, seconds: float, begun_at: int) -> str:
    """Progress in words."""
    of = f"{done:,.0f} of " if total is not None else ""
    rate = (done - begun_at) / max(seconds, 1e-9)
    eta = f", ETA {format_seconds((total - done) / rate)}" if total and rate > 0 and done < total else ""
    many = counted(round(done if total is None else total), unit.removesuffix("s"))
    return f"{of}{many}, {format_rate(done - begun_at, seconds, unit)}, {format_seconds(seconds)}{eta}"


def format_rate(done: float, seconds: float, unit: str) -> str:
    """Units a second, or seconds a unit where they are slow.

    Example:
        >>> format_rate(3000, 2, "tokens"), format_rate(2, 120, "layers")
        ('1,500 tokens/s', '60.0 s each')
    """
    rate = done / seconds if seconds > 0 else 0.0
    return f"{rate:,.0f} {unit}/s" if rate >= 2 or not rate else f"{1 / rate:.1f} s each"


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``1:15``.

    Example:
        >>> format_seconds(75.2)
        '1:15'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
