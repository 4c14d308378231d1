"""What all figures share: colours that the colour-blind tell apart, labels that do not overlap."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, neighbours far apart; markers repeat what colours say.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#000000", "#7F7F7F", "#B2ABD2")
BEFORE, AFTER = COLOURS[:2]
CUT = AFTER
# A page gives its own ink to what is black; text on a coloured cell keeps this.
ON_LIGHT = "#111111"
GREY = "#7F7F7F"
INK = "#000000"
MARKERS = "osD^vPX*<>"


def colour(number: int) -> str:
    """Of a line or a group; after the last of the palette they begin again."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """The same for markers."""
    return MARKERS[number % len(MARKERS)]


def stage_colour(stage: str, number: int) -> str:
    """Of an evaluated model: the unedited one has always the same, and the first edited one."""
    return BEFORE if stage in ("baseline", "before") else colour(max(1, number))


def new_figure(width: float = 8.0, height: float = 4.2) -> Figure:
    """An empty figure, in inches; made without pyplot, so that nothing keeps it in memory."""
    return Figure(figsize=(width, height), layout="constrained")


def depth_colours(blocks: Sequence[int | None]) -> list[tuple[float, float, float, float]]:
    """Colours from dark (first block) to light, in cividis, which is made for the colour-blind."""
    shades = matplotlib.colormaps["cividis"]
    return [shades(0.9 * i / max(1, len(blocks) - 1)) for i in range(len(blocks))]


def name_blocks(axes: Axes, lines: int) -> None:
    """A legend of blocks; of many only some, evenly spread, with the colours in between left to the eye."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    step = max(1, -(-lines // 8))
    some = sorted({*range(0, len(labels), step), len(labels) - 1})
    axes.legend([handles[i] for i in some], [labels[i] for i in some], fontsize=7, loc="best")
