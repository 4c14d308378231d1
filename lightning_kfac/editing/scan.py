"""Which layers carry the recitation? One block and one projection at a time, and a setting worth recommending."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.models.targets import block_of, projection_of

WINDOWS_TRIED = 3


def places(names: Iterable[str]) -> dict[int, list[str]]:
    """Projections by block of some layers."""
    found: dict[int, list[str]] = {}
    for name in names:
        block = block_of(name)
        projection = projection_of(name)
        if block is not None and projection is not None:
            found.setdefault(block, []).append(projection)
    return dict(sorted(found.items()))


def single_edits(layers: Mapping[int, Sequence[str]], base: EditConfig) -> list[EditConfig]:
    """An edit of each block with all its projections, and of each of its projections alone.

    Example:
        >>> [(edit.blocks, edit.projections) for edit in single_edits({3: ["gate", "up"]}, EditConfig())]
        [([3], ['gate', 'up']), ([3], ['gate']), ([3], ['up'])]
    """
    edits = []
    for block, projections in layers.items():
        each = [[projection] for projection in projections] if len(projections) > 1 else []
        edits += [replace(base, blocks=[block], projections=some) for some in [list(projections), *each]]
    return edits


def worthwhile(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Recitation that an edit takes away for what it costs: drop of strict accuracy over rise of log perplexity."""
    if after["perplexity"] is None or not math.isfinite(after["perplexity"]):
        return -math.inf  # the edit broke the model
    drop = before["strict_acc"] - after["strict_acc"]
    return drop / max(1e-3, math.log(after["perplexity"] / before["perplexity"]))


def candidates(
    rows: Mapping[int, Mapping[str, Any]],
    before: Mapping[str, Any],
    layers: Mapping[int, Sequence[str]],
    base: EditConfig,
    rhos: Sequence[float],
    widest: int,
) -> list[EditConfig]:
    """Edits of neighbouring blocks that are worth trying, by what their blocks did alone.

    Args:
        rows: What an edit of each block alone (all projections) measured.
        before: What the unedited model measured.
        layers: Projections by block.
        base: The kind of edit.
        rhos: To try for each window of blocks.
        widest: Most blocks of a window.
    """
    blocks = list(rows)
    worth = {block: worthwhile(before, row) for block, row in rows.items()}
    edits: list[EditConfig] = []
    for width in range(1, min(widest, len(blocks)) + 1):
        windows = [blocks[i : i + width] for i in range(len(blocks) - width + 1)]
        windows = [w for w in windows if w[-1] - w[0] == width - 1]
        best = sorted(windows, key=lambda window: -sum(worth[block] for block in window))[:WINDOWS_TRIED]
        for window in best:
            shared = [p for p in layers[window[0]] if all(p in layers[block] for block in window)]
            edits += [replace(base, blocks=window, projections=shared, rho=rho) for rho in rhos if shared]
    return edits


def recommended(rows: Sequence[Mapping[str, Any]], target: float) -> int | None:
    """Number of the cheapest row (by perplexity) whose strict accuracy is at or below the target."""
    usable = [i for i, row in enumerate(rows) if row["perplexity"] is not None and math.isfinite(row["perplexity"])]
    reached = [i for i in usable if rows[i]["strict_acc"] <= target]
    return min(reached, key=lambda i: rows[i]["perplexity"], default=None)
