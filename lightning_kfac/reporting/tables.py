"""Results as a person reads them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_kfac.console import counted, literal, show, visible
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.math.separation import FPR
from lightning_kfac.metrics.leaks import SCORES, TPR
from lightning_kfac.reporting.escape import as_markdown
from lightning_kfac.reporting.labels import (
    METRICS,
    OF_A_SET,
    OF_GENERAL,
    OF_LEAKS,
    OF_QUESTIONS,
    OF_STRESS,
    SWEEP_COLUMNS,
    is_telling,
    measured_leaks,
    stage_label,
)

# What a person reads for the fields of an example.
SHOWN = {"prefix": "prefix", "gold": "true continuation", "before": "unedited", "after": "edited"}
SWEEP_LEGEND = {
    "kept": "share of the components that stay",
    "change": "of the weights, ||W' - W|| / ||W||, mean over the layers",
    "strict": "share of the sequences that are recited word for word",
    "Pareto": "a star where no other edit both recites less and costs less perplexity",
}
BOLD = "bold: where the edited model leaves the true continuation"


class Example(NamedTuple):
    """One sequence as text.

    Attributes:
        gold: The true continuation.
        before, after: That of the unedited and of the edited model.
        diverging: End of ``after``, from the first token that is not the true one.
    """

    prefix: str
    gold: str
    before: str
    after: str
    diverging: str = ""


def comparison_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures of each evaluated stage with 95 % intervals, and what changed since the first.

    Args:
        records: Stage to record: figures, and ``intervals`` and ``differences`` by the name of the figure.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Before and after" if len(records) > 1 else None, title_justify="left")
    table.add_column(Text("with 95 % intervals", "dim"), overflow="fold", min_width=20)
    for stage, record in records.items():
        table.add_column(stage_label(stage), justify="right", no_wrap=True)
        if record.get("differences"):
            table.add_column("change", justify="right", no_wrap=True)
    first = next(iter(records.values()))
    for prefix in _sets(first):
        count = counted(first[f"{prefix}n_sequences"], "sequence")
        table.add_row(_heading(prefix.rstrip("/") or "memorized", f" ({count})"))
        _add(table, prefix, OF_A_SET, records)
    if "stress/stress_len" in first:
        table.add_row(_heading("memorized, position stress"))
        _add(table, "stress/", OF_STRESS, records)
    if "perplexity" in first:
        table.add_row(_heading("general ability"))
        _add(table, "", OF_GENERAL, records)
    for prefix in _sets(first, "n_questions"):
        table.add_row(_heading(prefix.rstrip("/"), f" ({counted(first[f'{prefix}n_questions'], 'question')})"))
        _add(table, prefix, OF_QUESTIONS, records)
    return table


def leaks_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """How well each measure tells members from non-members at each stage, and what changed since the first.

    Args:
        records: As for ``comparison_table``.
    """
    first = next(iter(records.values()))
    counts = f"{counted(first['leaks.members'], 'member')}, {counted(first['leaks.nonmembers'], 'non-member')}"
    table = Table(box=box.SIMPLE_HEAD, title=f"Members against non-members: {counts}", title_justify="left")
    table.add_column("", overflow="fold", min_width=12)
    for stage, record in records.items():
        table.add_column(Text(f"{visible(stage_label(stage))}:\nAUC"), justify="right", no_wrap=True)
        table.add_column(Text(f"found at\n{FPR:.0%} FPR"), justify="right", no_wrap=True)
        if record.get("differences"):
            table.add_column(Text("change\nof AUC"), justify="right", no_wrap=True)
    for name in measured_leaks(records.values()):
        key = f"{OF_LEAKS[name]}.auc"
        cells = []
        for record in records.values():
            cells.append(_with_interval("{:.3f}", record.get(key), record.get("intervals", {}).get(key)))
            cells.append(_with_interval("{:.3f}", record.get(f"{OF_LEAKS[name]}.{TPR}"), None))
            if changes := record.get("differences"):
                change, *bounds = changes.get(key) or [None]
                cells.append(Text() if change is None else _with_interval("{:+.3f}", change, bounds))
        table.add_row(SCORES[name].title, *cells)
    return table


def examples_table(examples: list[Example]) -> Table:
    """Prefix, true continuation and both models' continuations of some sequences; what diverges stands out."""
    table = Table(box=box.SIMPLE_HEAD, title="Continuations of memorized sequences", title_justify="left")
    table.add_column("")
    table.add_column("text", overflow="fold")
    for example in examples:
        for name in ("prefix", "gold", "before"):
            table.add_row(SHOWN[name], literal(_one_line(getattr(example, name))))
        same, rest = _split(example)
        table.add_row(SHOWN["after"], Text.assemble(literal(same), literal(rest, "bold")))
        table.add_section()
    return table


def examples_markdown(examples: list[Example]) -> str:
    """The same for TensorBoard's text page: what diverges is bold."""
    parts = []
    for number, example in enumerate(examples, start=1):
        same, rest = (as_markdown(text) for text in _split(example))
        parts.append(f"### {number}\n")
        for name in ("prefix", "gold", "before"):
            parts.append(f"**{SHOWN[name]}**\n\n> {as_markdown(_one_line(getattr(example, name)))}\n")
        parts.append(f"**{SHOWN['after']}**\n\n> {same}{f'**{rest}**' if rest else ''}\n")
    return "\n".join(parts)


def _heading(name: str, rest: str = "") -> Text:
    return Text.assemble(literal(name, "bold"), literal(rest))


def _split(example: Example) -> tuple[str, str]:
    """``after`` up to where it diverges, and from there."""
    line = _one_line(example.after)
    rest = _one_line(example.diverging)
    if not rest or not line.endswith(rest):
        return line, ""
    return line[: len(line) - len(rest)], rest


def _sets(results: Mapping[str, object], count: str = "n_sequences") -> list[str]:
    return [key.removesuffix(count) for key in results if key.endswith(count)]


def _add(table: Table, prefix: str, kinds: Sequence[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each figure that any stage has."""
    for kind in kinds:
        key = f"{prefix}{kind}"
        label = METRICS[kind]
        if not is_telling(key, records.values()):
            continue
        cells = []
        for record in records.values():
            cells.append(_with_interval(label.style, record.get(key), record.get("intervals", {}).get(key)))
            if changes := record.get("differences"):
                change, *bounds = changes.get(key) or [None]
                style = label.style.replace(":", ":+")
                cells.append(Text() if change is None else _with_interval(style, change, bounds))
        table.add_row(f"  {label.title}", *cells)


def _with_interval(style: str, value: float | None, bounds: Sequence[float | None] | None) -> Text:
    if value is None:
        return Text("n/a")
    text = style.format(value)
    if not bounds or bounds[0] == bounds[1] == value:
        return Text(text)
    if None in bounds:  # of one sequence or one document, which says nothing of others
        return Text.assemble(text, (" [n/a]", "dim"))
    return Text.assemble(text, (f" [{style.format(bounds[0])}, {style.format(bounds[1])}]", "dim"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def sweep_table(rows: Sequence[Mapping[str, Any]], title: str, front: Collection[int] = ()) -> Table:
    """One line an edit: what it was, what it kept, and every figure.

    Args:
        rows: Results of a sweep.
        title: Above the table.
        front: Numbers of the rows on the Pareto front, which get a star.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    places = len({edit_place(row["edit"]) for row in rows if row["edit"]}) > 1
    first = next(iter(rows), {})
    figures = [key for key in first if key.split("/")[-1] in SWEEP_COLUMNS and first[key] is not None]
    for name in ("edit", *(["where"] if places else [])):
        table.add_column(name, overflow="fold")
    for name in ("rho", *(["Pareto"] if front else []), "kept", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in figures:
        table.add_column(_short_title(key), justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        edit = row["edit"]
        star = ["*" if number in front else ""] if front else []
        cells = ["unedited", *([""] if places else []), "", *star, "", ""]
        if edit:
            seeds = f" ({row['n_seeds']} seeds)" if row.get("n_seeds", 1) > 1 else ""
            numbers = [f"{edit['fraction_kept']:.1%}", f"{edit['relative_change']:.2f}"]
            cells = [edit_label(edit) + seeds, *([edit_place(edit)] if places else []), f"{edit['rho']:g}", *star]
            cells += numbers
        for key in figures:
            value = row.get(key)
            cells.append("n/a" if value is None else SWEEP_COLUMNS[key.split("/")[-1]][1].format(value))
        table.add_row(*cells)
    return table


def _short_title(key: str) -> Text:
    """Of a column: the set above the figure, and no line longer than it must be."""
    prefix, _, name = key.rpartition("/")
    title = SWEEP_COLUMNS[name][0] or ""
    words = title.replace("in 1,000 samples", "in 1,000\nsamples").replace("answers right", "answers\nright")
    return Text(f"{visible(prefix)}\n{words}" if prefix else words)


def show_sweep(table: Table) -> None:
    """Prints a sweep's table with its legend; every part has the columns up to rho."""
    titles = [str(column.header) for column in table.columns]
    lines = [f"{name}: {meaning}" for name, meaning in SWEEP_LEGEND.items() if name in titles]
    show(table, lines, names=titles.index("rho") + 1)
