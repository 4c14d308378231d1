"""Progress with a rate and an ETA: a live bar on a terminal, a plain line every few seconds in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

SECONDS_BETWEEN_LINES = 10.0
SHORTEST_SHOWN = 2.0
WIDTH_OF_LOGS = 160
# Results go to the standard output, progress to the standard error.
console = Console(highlight=False, emoji=False, soft_wrap=True)
progress_console = Console(highlight=False, emoji=False, soft_wrap=True, stderr=True)


def show(table: object) -> None:
    """Prints a table; where there is no terminal, as wide as it needs to be."""
    Console(highlight=False, emoji=False, width=None if console.is_terminal else WIDTH_OF_LOGS).print(table)


def say(text: str) -> None:
    """Tells the user something that is no result; on rank 0 only."""
    if _speaks():
        progress_console.print(text)


def _speaks() -> bool:
    return getattr(rank_zero_only, "rank", 0) in (None, 0)


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
            task = bar.add_task(description, total=total, completed=done, unit=unit, begun_at=done)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _line_printer(description, unit, total, done)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
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
