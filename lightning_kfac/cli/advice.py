"""One recommended command, ready to copy, and what it is expected to cost, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_kfac.console import console
from lightning_kfac.reporting.commands import apply_words

__all__ = ["apply_words", "cost_in_words", "show_advice"]
Row = Mapping[str, Any]


def cost_in_words(before: Row, after: Row) -> str:
    """What to expect on sequences that chose nothing, and of general text.

    Example:
        >>> cost_in_words({"strict_acc": 1.0, "perplexity": 70.0}, {"strict_acc": 0.03, "perplexity": 73.5})
        'of 100 sequences that chose nothing it should recite about 3 (unedited: 100); perplexity 70 -> 73.5 (+5.0 %)'
    """
    texts = [
        f"of 100 sequences that chose nothing it should recite about {100 * after['strict_acc']:.0f} "
        f"(unedited: {100 * before['strict_acc']:.0f})"
    ]
    if before.get("perplexity") and after.get("perplexity"):
        rise = after["perplexity"] / before["perplexity"] - 1
        texts.append(
            f"perplexity {before['perplexity']:.4g} -> {after['perplexity']:.4g} ({rise:+.1%})".replace("%", " %")
        )
    if after.get("ndcg@10") is not None:
        texts.append(f"nDCG@10 of its predictions {after['ndcg@10']:.3f} (unedited: 1)")
    if after.get("edit"):
        texts.append(f"the weights change by {after['edit']['relative_change']:.0%} of their norm".replace("%", " %"))
    return "; ".join(texts)


def show_advice(command: str, expected: str, notes: Sequence[str] = ()) -> None:
    """Prints what to do: the command on a line of its own."""
    console.print("Recommended:")
    console.print(f"  {command}")
    console.print(f"Expect: {expected}.")
    for note in notes:
        console.print(note)
