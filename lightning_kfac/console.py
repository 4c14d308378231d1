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
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

SECONDS_BETWEEN_LINES = 10.0
SHORTEST_SHOWN = 2.0
WIDTH_OF_LOGS = 160
WIDEST = 120
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


def show(table: object) -> None:
    """Prints a table; where there is no terminal, as wide as it needs to be."""
    PlainConsole(width=None if console.is_terminal else WIDTH_OF_LOGS).print(table)


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


class RateColumn(ProgressColumn):
    """Units a second since the start."""

    @override
    def render(self, task: Task) -> Text:
        return Text(format_rate(task.completed - task.fields["begun_at"], task.elapsed or 0.0, task.fields["unit"]))


@contextmanager
def track_count(
    description: str, unit: str, total: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Shows progress while the block runs; yields a function that takes the number of units done.

    Only rank 0 shows anything. ``done`` units are there already, and count in no rate.

    Example:
        >>> with track_count("count", "numbers", total=3) as advance_to:
        ...     for i in range(3):
        ...         advance_to(i + 1)  # doctest: +SKIP
    """
    if not _speaks():
        yield lambda done: None
    elif progress_console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(visible(description), total=total, completed=done, unit=unit, begun_at=done)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _line_printer(description, unit, total, done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}", markup=False),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        console=progress_console,
    )


def _line_printer(description: str, unit: str, total: int | None, begun_at: int) -> Callable[[int], None]:
    start = printed = time.monotonic()
    finished = False

    def advance_to(done: int) -> None:
        nonlocal printed, finished
        now = time.monotonic()
        last = done == total and now - start > SHORTEST_SHOWN
        if finished or not (last or now - printed > SECONDS_BETWEEN_LINES):
            return
        printed = now
        finished = done == total
        rate = (done - begun_at) / max(now - start, 1e-9)
        eta = f", ETA {format_seconds((total - done) / rate)}" if total and rate and done < total else ""
        of = f" of {total:,}" if total else ""
        progress_console.print(
            f"{description}: {done:,}{of} {unit}, {format_rate(done - begun_at, now - start, unit)}, "
            f"{format_seconds(now - start)}{eta}"
        )

    return advance_to


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


def counted(count: int, name: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "text"), counted(1200, "text")
        ('1 text', '1,200 texts')
    """
    return f"{count:,} {name}{'' if count == 1 else 's'}"
