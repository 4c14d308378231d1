"""``python -m benchmarks.real_page`` prints the tables and draws the figure of docs/real_model.md, from the results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.real_model import RESULT
from benchmarks.sizes import RESULT as SIZES
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.reporting.figures.style import COLOURS, colour, marker, new_figure

FIGURE = Path(__file__).parents[1] / "docs" / "real_model.png"
CURVATURE = COLOURS[0]
CONTROL = COLOURS[8]


def with_interval(row: Mapping[str, Any], name: str, digits: int = 2, kind: str = "intervals") -> str:
    """``0.06 [0.02, 0.20]``; of differences ``+4.45 [+4.04, +4.88]``."""
    sign = "+" if kind == "differences" else ""
    value, *ends = row["differences"][name] if sign else (row["figures"][name], *row["intervals"][name])
    return f"{value:{sign}.{digits}f} [{', '.join(f'{end:{sign}.{digits}f}' for end in ends)}]"


def compared(steps: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The edits, the cheapest first."""
    return sorted(steps["compare"]["edits"], key=lambda row: row["figures"]["perplexity"])


def comparison_lines(steps: Mapping[str, Any]) -> list[str]:
    """Each formula at equal forgetting."""
    sources: Sequence[str] = steps["texts"]["sources"]
    heads = [f"{name}, reported" for name in sources]
    lines = [
        f"| formula | rho | kept | change of weights | strict, choosing | {' | '.join(heads)} | Levenshtein | "
        "in 1,000 samples | perplexity | nDCG@10 |",
        "|---" * (8 + len(sources)) + "|",
    ]
    before = steps["compare"]["baseline"]
    for row in [before, *compared(steps)]:
        figures = row["figures"]
        edit = row.get("edit")
        name = "unedited" if edit is None else f"`{edit['formula']}`"
        about = ["", "", ""]
        if edit is not None:
            about = [f"{edit['rho']:g}", f"{edit['fraction_kept']:.1%}", f"{edit['relative_change']:.2f}"]
        strict = [with_interval(row, f"{source}/strict_acc") for source in sources]
        reported = [
            f"{sum(figures[f'{source}/{name}'] for source in sources) / len(sources):.2f}"
            for name in ("avg_levenshtein_norm", "extraction.expected_at.1000")
        ]
        cost = f"{figures['perplexity']:.2f}" if edit is None else with_interval(row, "perplexity", 2, "differences")
        cells = [name, *about, f"{figures['strict_acc']:.2f}", *strict, *reported, cost, f"{figures['ndcg@10']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attack_lines(steps: Mapping[str, Any]) -> list[str]:
    """What attacks get."""
    lines = ["| | strict | Levenshtein | recovered of strict | perplexity |", "|---|---|---|---|---|"]
    for row in steps["attack"]["rows"]:
        name = row["label"] or {"baseline": "unedited"}.get(row["stage"], row["stage"])
        if row["attack"] and "steps" in row["attack"]:
            name += f", {row['attack']['steps']} steps"
        share = (row["recovered"] or {}).get("strict_acc")
        recovered = "" if share is None else f"{share[0]:.0%} [{share[1]:.0%}, {share[2]:.0%}]"
        figures = [with_interval(row, "strict_acc"), with_interval(row, "avg_levenshtein_norm")]
        cells = [name, *figures, recovered, f"{row['figures']['perplexity']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def scan_lines(steps: Mapping[str, Any]) -> list[str]:
    """Each block and projection alone, then settings."""
    before = steps["scan"]["baseline"]["figures"]
    lines = ["| blocks | projections | rho | strict | perplexity |", "|---|---|---|---|---|"]
    lines.append(f"| unedited | | | {before['strict_acc']:.2f} | {before['perplexity']:.2f} |")
    for row in steps["scan"]["edits"]:
        edit = row["edit"]
        where = [", ".join(map(str, edit["blocks"])), ", ".join(edit["projections"]), f"{edit['rho']:g}"]
        figures = [f"{row['figures']['strict_acc']:.2f}", f"{row['figures']['perplexity']:.2f}"]
        lines.append(f"| {' | '.join([*where, *figures])} |")
    return lines


def ability_lines(steps: Mapping[str, Any]) -> list[str]:
    """What is left of each ability."""
    lines = ["| task | group | n | chance | unedited | edited | kept | p |", "|---|---|---|---|---|---|---|---|"]
    for task in steps["abilities"]["tasks"]:
        values = [f"{task['chance']:.2f}", *(f"{task[which][0]:.2f}" for which in ("unedited", "edited"))]
        share, *ends = task["retention"] or (None,)
        kept = "at chance" if task["at_chance"] or share is None else f"{share:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]"
        p = "< 0.001" if task["p"] < 0.001 else f"{task['p']:.3f}"
        cells = [task["name"], task["group"], str(task["n"]), *values, kept, p]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_lines(steps: Mapping[str, Any]) -> list[str]:
    """Minutes of each step."""
    lines = ["| step | minutes | of these, CPU |", "|---|---|---|"]
    return lines + [
        f"| {name} | {found['wall_s'] / 60:.1f} | {found['cpu_s'] / 60:.1f} |" for name, found in steps.items()
    ]


def size_lines(result: Mapping[str, Any]) -> list[str]:
    """The price of suppression against parameters."""
    lines = [
        "| parameters | recited before | formula | rho | strict, choosing | reported | perplexity | change | of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["sizes"].values():
        suppress = found["suppress"]
        before = suppress["baseline"]["figures"]
        size = f"{found['train']['parameters'] / 1e6:.1f} M"
        recited = f"{found['train']['recited']['planted_report']:.2f}"
        for formula in (name for name, rho in suppress["rhos"].items() if rho is None):
            least = f"not below {suppress['least'][formula]:.2f}"
            lines.append(f"| {size} | {recited} | `{formula}` | none | {least} | | {before['perplexity']:.2f} | | |")
        for row in suppress["edits"]:
            edit = row["edit"]
            change = row["differences"]["perplexity"][0] / before["perplexity"]
            cells = [
                size,
                recited,
                f"`{edit['formula']}`",
                f"{edit['rho']:g}",
                f"{row['figures']['strict_acc']:.2f}",
                with_interval(row, "report/strict_acc"),
                f"{before['perplexity']:.2f}",
                with_interval(row, "perplexity", 2, "differences"),
                f"{change:+.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(steps: Mapping[str, Any]) -> Figure:
    """What each formula costs at equal forgetting, and what it leaves of the reported half."""
    rows = compared(steps)[::-1]
    sources = steps["texts"]["sources"]
    figure = new_figure(9, 0.34 * len(rows) + 1.4)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["edit"]["formula"] for row in rows]
    places = range(len(rows))
    colours = [CONTROL if FORMULAS[name].control else CURVATURE for name in names]
    changes = [row["differences"]["perplexity"] for row in rows]
    spread = [[value - low for value, low, _ in changes], [high - value for value, _, high in changes]]
    left.barh(places, [value for value, *_ in changes], xerr=spread, color=colours, error_kw={"lw": 1, "capsize": 2})
    left.set_yticks(places, names)
    left.set_xlabel("rise of perplexity on held-out text, with 95 % intervals")
    for number, source in enumerate(sources):
        shares = [row["figures"][f"{source}/strict_acc"] for row in rows]
        ends = [row["intervals"][f"{source}/strict_acc"] for row in rows]
        spread = [[value - end[0] for value, end in zip(shares, ends, strict=True)]]
        spread.append([end[1] - value for value, end in zip(shares, ends, strict=True)])
        heights = [place + 0.15 - 0.3 * number for place in places]
        shown = {"fmt": marker(number), "color": colour(4 + number), "ms": 5, "elinewidth": 1, "capsize": 2}
        right.errorbar(shares, heights, xerr=spread, label=f"{source}, reported", **shown)
    right.set_xlim(-0.02, 1)
    right.set_xlabel("strict accuracy on the half that chose nothing")
    right.legend(fontsize=8)
    figure.suptitle("Each formula at equal forgetting (blue: curvature, grey: controls)", fontsize=10)
    return figure


def main() -> None:
    """Prints the tables and draws the figure."""
    steps = json.loads(RESULT.read_text("utf-8"))["steps"]
    for lines in (scan_lines, comparison_lines, attack_lines, ability_lines, time_lines):
        print("\n".join(lines(steps)), end="\n\n")
    if SIZES.is_file():
        print("\n".join(size_lines(json.loads(SIZES.read_text("utf-8")))))
    draw(steps).savefig(FIGURE, dpi=110)
    print(f"-> {FIGURE}")


if __name__ == "__main__":
    main()
