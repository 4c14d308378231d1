"""Results as a person reads them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

METRICS = {
    "strict_acc": ("strict accuracy", "{:.3f}"),
    "loose_acc": ("loose accuracy", "{:.3f}"),
    "avg_levenshtein_norm": ("normalised Levenshtein", "{:.3f}"),
    "perplexity": ("perplexity, held-out text", "{:.2f}"),
    "ndcg@10": ("nDCG@10 against the unedited", "{:.4f}"),
}


class Example(NamedTuple):
    """One sequence as text."""

    prefix: str
    gold: str
    before: str
    after: str


def comparison_table(evaluations: Mapping[str, Mapping[str, float | int | None]]) -> Table:
    """One column for each evaluated stage, one row for each metric; memorized sets one below the other."""
    table = Table(box=box.SIMPLE_HEAD, title="Before and after" if len(evaluations) > 1 else None, title_justify="left")
    table.add_column("")
    for stage in evaluations:
        table.add_column(stage, justify="right")
    first = next(iter(evaluations.values()))
    for prefix in _sets(first):
        count = first.get(f"{prefix}n_sequences")
        table.add_row(f"[bold]{prefix.rstrip('/') or 'memorized'}[/] ({count} sequences)")
        for key in ("strict_acc", "loose_acc", "avg_levenshtein_norm"):
            _add(table, f"{prefix}{key}", key, evaluations)
    if "perplexity" in first:
        table.add_row("[bold]general ability[/]")
        for key in ("perplexity", "ndcg@10"):
            _add(table, key, key, evaluations)
    return table


def examples_table(examples: list[Example]) -> Table:
    """Prefix, gold suffix and both continuations of some sequences."""
    table = Table(box=box.SIMPLE_HEAD, title="Continuations of memorized sequences", title_justify="left")
    for name in ("", "text"):
        table.add_column(name, overflow="fold")
    for example in examples:
        for name, text in zip(Example._fields, example, strict=True):
            table.add_row(name, Text(_one_line(text)), end_section=name == "after")
    return table


def examples_markdown(examples: list[Example]) -> str:
    """The same for TensorBoard's text page."""
    parts = []
    for number, example in enumerate(examples, start=1):
        parts.append(f"### {number}\n")
        parts += [f"**{name}**\n\n> {_escaped(text)}\n" for name, text in zip(Example._fields, example, strict=True)]
    return "\n".join(parts)


def _sets(results: Mapping[str, object]) -> list[str]:
    return [key.removesuffix("n_sequences") for key in results if key.endswith("n_sequences")]


def _add(table: Table, key: str, kind: str, evaluations: Mapping[str, Mapping]) -> None:
    title, style = METRICS[kind]
    values = [results.get(key) for results in evaluations.values()]
    table.add_row(f"  {title}", *(("n/a" if v is None else style.format(v)) for v in values))


def _escaped(text: str) -> str:
    """As Markdown that shows the text itself."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())
