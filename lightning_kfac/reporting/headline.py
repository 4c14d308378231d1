"""What a report begins with: the answer in words, and at most three large figures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_kfac.console import counted
from lightning_kfac.editing import sweep
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.reporting.attacks import STRICT, attack_label, attack_rows, recovered_cell
from lightning_kfac.reporting.competitors import chosen, strength
from lightning_kfac.reporting.page import big, paragraph, section
from lightning_kfac.reporting.run import Run

Row = Mapping[str, Any]
SAMPLES = "extraction.expected_at.1000"
NO_PROOF = "Recall is disrupted; that the text is gone is not shown."


class Headline(NamedTuple):
    """The answer.

    Attributes:
        texts: In words, the most important first.
        figures: Large figures, and what each says.
    """

    texts: list[str]
    figures: list[tuple[str, str]]


def headline(run: Run) -> str:
    """The verdict and three large figures; empty where nothing was found yet."""
    found = _of(run)
    if found is None:
        return ""
    first, *rest = found.texts
    return section("Verdict", paragraph(first, lead=True), big(found.figures), *map(paragraph, rest))


def _of(run: Run) -> Headline | None:
    stages = run.stages
    if run.compared:
        return _of_methods(run)
    if run.attacks:
        return _of_attacks(run.attacks)
    if advised := run.findings.get("recommended"):
        return _of_scan(advised)
    if run.is_grid:
        return _of_grid(run)
    if study := run.findings.get("crystallization"):
        return _of_attention(study)
    if mined := run.findings.get("mining"):
        return _of_mining(mined)
    if found := run.findings.get("abilities"):
        return _of_abilities(found)
    if "baseline" in stages and len(stages) > 1:
        return Headline(*of_pair(stages["baseline"], list(stages.values())[-1]))
    if stages:
        return _of_one(list(stages.values())[-1])
    return None


def of_pair(before: Row, after: Row, it: str = "The edit") -> tuple[list[str], list[tuple[str, str]]]:
    """Words and large figures of an unedited model and an edited one.

    Args:
        before, after: Results: figures, and ``intervals`` and ``differences`` by the name of the figure.
        it: What changed the model.
    """
    texts: list[str] = []
    figures: list[tuple[str, str]] = []
    if before.get(STRICT) is not None and after.get(STRICT) is not None:
        texts += [f"{it} {_effect(before, after)}: {_recited(before, after)}."]
        figures += [(f"{_count(after)} of {_n(after)}", f"recited word for word after; {_count(before)} before")]
    costs = []
    if before.get("perplexity") and after.get("perplexity"):
        costs.append(_perplexity(before, after))
        rise = after["perplexity"] / before["perplexity"] - 1
        values = f"{before['perplexity']:.2f} to {after['perplexity']:.2f}"
        figures += [(_percent(rise, "+.1f"), f"perplexity of other text ({values})")]
    if after.get("ndcg@10") is not None:
        costs.append(f"{_percent(after['ndcg@10'], '.0f')} of the rankings of its next tokens stay (nDCG@10)")
        figures += [(_percent(after["ndcg@10"], ".0f"), "of the rankings of next tokens kept (nDCG@10)")]
    texts += [f"The cost: {'; '.join(costs)}."] if costs else []
    if after.get(SAMPLES) is not None and before.get(SAMPLES) is not None:
        shares = [_percent(row[SAMPLES], ".1f") for row in (after, before)]
        texts.append(f"In 1,000 samples of each sequence {shares[0]} are expected to come out; before, {shares[1]}.")
    if figures:
        texts.append(NO_PROOF)
    return texts or ["Nothing was measured that both models have."], figures


def _effect(before: Row, after: Row) -> str:
    """How much of the recitation went, in words."""
    change = (after.get("differences") or {}).get(STRICT) or [after[STRICT] - before[STRICT], None, None]
    if (change[2] is not None and change[2] >= 0) or change[0] >= 0:
        return "does not measurably suppress recitation"
    left = after[STRICT] / before[STRICT]
    share = "nearly all" if left <= 0.1 else "most" if left <= 0.5 else "part"
    return f"suppresses {share} of the recitation"


def _recited(before: Row, after: Row) -> str:
    low, high = (after.get("intervals") or {}).get(STRICT) or (None, None)
    within = ""
    if low is not None and high is not None:
        within = f" ({_percent(low, '.1f')} to {_percent(high, '.1f')} of such sequences)"
    return (
        f"of {counted(_n(before), 'sequence')} the unedited model recites {_count(before)} word for word, the edited "
        f"one {_count(after)}{within}"
    )


def _perplexity(before: Row, after: Row) -> str:
    change = (after.get("differences") or {}).get("perplexity")
    rise = after["perplexity"] / before["perplexity"] - 1
    verb = "rises" if rise > 0 else "falls"
    within = ""
    if change and None not in change:
        ends = sorted(abs(bound) / before["perplexity"] for bound in change[1:])
        within = f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if change[1] * change[2] > 0 else " (or not at all)"
    return f"perplexity of other text {verb} by {_percent(abs(rise), '.1f')}{within}"


def _of_one(row: Row) -> Headline | None:
    texts: list[str] = []
    figures: list[tuple[str, str]] = []
    if row.get(STRICT) is not None:
        texts.append(f"The model recites {_count(row)} of {counted(_n(row), 'sequence')} word for word.")
        figures.append((f"{_count(row)} of {_n(row)}", "recited word for word"))
    if row.get(SAMPLES) is not None:
        figures.append((_percent(row[SAMPLES], ".1f"), "expected to come out in 1,000 samples of each"))
    if row.get("perplexity"):
        figures.append((f"{row['perplexity']:.2f}", "perplexity of held-out text"))
        texts = texts or [f"The perplexity of held-out text is {row['perplexity']:.2f}."]
    return Headline(texts, figures) if texts else None


def _of_grid(run: Run) -> Headline | None:
    rows = sweep.average_seeds(run.results)
    before = next((row for row in rows if row["edit"] is None), None)
    edits = [row for row in rows if row["edit"]]
    if before is None or not any(row.get(STRICT) is not None for row in edits):
        return None
    target = float(run.settings.get("target") or 0.1)
    reached = sweep.weakest_settings(edits, target)
    many = counted(len(edits), "edit")
    if not reached:
        least = min(row[STRICT] for row in edits if row.get(STRICT) is not None)
        return Headline(
            [f"None of {many} brings strict accuracy to {target:g} or less; the least is {least:.3f}."],
            [(f"{least:.2f}", "least strict accuracy of any edit")],
        )
    texts, figures = of_pair(
        before, reached[0], f"Of {many} the cheapest that suffices, {setting(reached[0]['edit'])},"
    )
    return Headline([*texts, CHOSE.format(target=target)], figures)


CHOSE = (
    "It suffices with a strict accuracy of {target:g} or less. These sequences chose it, so that others may fare worse."
)


def _of_scan(advised: Row) -> Headline:
    words = in_words(advised["blocks"], advised["projections"], advised["rho"])
    before, after = advised["reporting"]
    texts, figures = of_pair(before, after, f"The recommended edit ({words})")
    return Headline([*texts, "Measured on the half of the sequences that did not choose it."], figures)


def _of_attacks(rows: Sequence[Row]) -> Headline:
    pair = {row["stage"]: row for row in rows if row.get("stage") in ("baseline", "edited")}
    known = [row for row in attack_rows(rows) if (row["recovered"].get(STRICT) or [None])[0] is not None]
    figures = [
        (
            f"{_count(pair['edited'])} of {_n(pair['edited'])}",
            f"recited after the edit; {_count(pair['baseline'])} before",
        )
    ]
    if not known:
        return Headline(["Nothing was suppressed that an attack could bring back."], figures)
    worst = max(known, key=lambda row: row["recovered"][STRICT][0])
    cell = recovered_cell(worst)
    within = f" ({cell.bounds})" if cell.bounds else ""
    text = (
        f"Of {counted(len(attack_rows(rows)), 'attack')} the strongest, {attack_label(worst)}, brings back "
        f"{cell.text}{within} of the recitation that the edit suppressed."
    )
    figures.append((cell.text, f"brought back by the strongest attack: {attack_label(worst)}"))
    none = sum(row["recovered"][STRICT][0] <= 0 for row in known)
    figures.append((f"{none} of {len(known)}", "attacks bring nothing back"))
    return Headline([text], figures)


def _of_methods(run: Run) -> Headline | None:
    target = run.compared["target"]
    before = next((row for row in reversed(run.results) if row.get("stage") == "baseline"), None)
    reached = [one for one in chosen(run.results, target) if one.reached]
    if before is None or not reached:
        return Headline([f"No method brings strict accuracy to {target:g} or less on the half that chose."], [])
    first = reached[0]
    text = (
        f"Of {counted(len(reached), 'method')} that bring strict accuracy to {target:g} or less, {first.label} "
        f"({strength(first.row)}) costs the least perplexity."
    )
    texts, figures = of_pair(before, first.row, "On sequences that it was not shown it")
    return Headline([text, *texts], figures)


def _of_mining(mined: Row) -> Headline:
    recited = mined.get("recited", 0)
    text = (
        f"Of {counted(mined.get('windows', 0), 'window')} that were looked at, {recited:,} "
        f"{'is' if recited == 1 else 'are'} recited word for word."
    )
    figures = [
        (f"{recited:,}", f"windows recited word for word, of {mined.get('windows', 0):,}"),
        (f"{mined.get('kept', 0):,}", "kept, without repetitions and duplicates"),
    ]
    if mined.get("checked") is not None:
        figures.append((f"{mined['checked']:,}", "windows checked one by one"))
    return Headline([text], figures)


def _of_abilities(found: Row) -> Headline:
    known = [task for task in found["tasks"] if not task["at_chance"] and task["retention"]]
    if not known:
        return Headline(["The unedited model does no better than chance on any task: there is nothing to lose."], [])
    ranked = sorted(known, key=lambda task: task["retention"][0])
    worst, best = ranked[0], ranked[-1]
    text = (
        f"Of {counted(len(known), 'task')} above chance, {worst['name']} keeps the least: {_kept(worst)} of its score."
    )
    figures = [(_percent(task["retention"][0], ".0f"), f"kept of {task['name']}") for task in (worst, best)]
    lost = sum(task["retention"][2] is not None and task["retention"][2] < 1 for task in known)
    figures.append((f"{lost} of {len(known)}", "tasks lose more than chance explains"))
    return Headline([text], figures if worst is not best else [figures[0], figures[2]])


def _kept(task: Row) -> str:
    value, low, high = task["retention"]
    within = "" if low is None or high is None else f" ({_percent(low, '.0f')} to {_percent(high, '.0f')})"
    return f"{_percent(value, '.0f')}{within}"


def _of_attention(study: Row) -> Headline:
    figures = []
    if cost := study["costs"].get("top1"):
        figures.append((_percent(cost["change"]["value"], "+.1f"), "perplexity with Top-1 attention"))
    if study.get("mean_effective_dimension") is not None:
        figures.append(
            (f"{study['mean_effective_dimension']:.1f}", "directions hold 90 % of the residuals, in the mean")
        )
    recited = study.get("recited") or {}
    if recited.get("top1") and recited.get("baseline"):
        counts = [round(share * n) for share, n in (recited["top1"], recited["baseline"])]
        figures.append((f"{counts[0]} of {recited['top1'][1]}", f"recited with Top-1 attention; {counts[1]} without"))
    return Headline([study["verdict"]], figures)


def setting(edit: Row) -> str:
    """An edit in words: ``original, blocks 3-4, gate, up, rho 0.8``."""
    return ", ".join(filter(None, [edit_label(edit), edit_place(edit), f"rho {edit['rho']:g}"]))


def in_words(blocks: Sequence[int], projections: Sequence[str], rho: float) -> str:
    """A setting without its formula: ``blocks 3, 4; gate, up; rho 0.8``."""
    name = "block" if len(blocks) == 1 else "blocks"
    return f"{name} {', '.join(map(str, blocks))}; {', '.join(projections)}; rho {rho:g}"


def _n(row: Row) -> int:
    return int(row.get("n_sequences") or 0)


def _count(row: Row) -> str:
    """How many sequences are recited; the share where their number is not known."""
    return f"{round(row[STRICT] * _n(row)):,}" if _n(row) else _percent(row[STRICT], ".0f")


def _percent(share: float, style: str) -> str:
    return f"{100 * share:{style}}".removesuffix(".0") + " %"
