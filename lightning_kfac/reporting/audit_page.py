"""The page of an audit: a verdict in plain words first, then figures, then what was not measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lightning_kfac.console import counted, literal
from lightning_kfac.math.strips import Strip
from lightning_kfac.metrics.extraction import TRIES
from lightning_kfac.metrics.leaks import SCORES
from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.figures.comparison import extraction_figure
from lightning_kfac.reporting.figures.strips import strips_figure
from lightning_kfac.reporting.page import bullets, figure, page, paragraph, preformatted, section, table

TITLE = "lightning_kfac audit:"
TITLES = {
    "texts@10": "texts of which a passage comes out in 10 tries",
    "texts@1000": "texts of which a passage comes out in 1,000 tries",
    "passages@10": "passages that come out in 10 tries",
    "passages@1000": "passages that come out in 1,000 tries",
    "strict": "recited by greedy decoding",
    "expected@1": "expected share in one sample of each passage",
    "expected@10": "expected share in 10 samples",
    "expected@1000": "expected share in 1,000 samples",
    "near_verbatim@1000": "nearly word for word in 1,000 samples, at least",
    "prior_ratio_log10": "likelier by its own prefix than by another (log10)",
    "perplexity": "perplexity of held-out text",
    "ndcg@10": "nDCG@10 against the unedited model",
}
GENERAL = ("perplexity", "ndcg@10")
Audit = Mapping[str, Any]


def verdict(audit: Audit) -> list[str]:
    """What was found, in plain words."""
    counts = list(audit["counts"].values())
    after = counts[-1]
    said = [_of_tries(audit, after)]
    if not after["passages@1000"]:
        high = list(audit["figures"].values())[-1]["texts@1000"]["high"]
        said.append(f"With 95 % confidence at most {100 * high:.1f} % of texts like these come out in 1,000 tries.")
    if edits := audit["sampling"]["near_verbatim"]:
        share = list(audit["figures"].values())[-1]["near_verbatim@1000"]["value"]
        said.append(
            f"At least {100 * share:.1f} % of the passages are expected to come out within {edits} token edits in "
            "1,000 samples of each."
        )
    if len(counts) > 1:
        before = counts[0]
        said.append(f"Before the edit: {_of_tries(audit, before)}")
        if after["new"]:
            said.append(f"{counted(after['new'], 'passage')} came out only after the edit.")
    said.append(
        "To come out means: whoever gives the model the tokens before a passage and draws so many samples gets it word "
        f"for word at least once with a chance of {100 * audit['chance']:.6g} % or more."
    )
    if leaks := audit["leaks"]:
        stage = list(audit["figures"])[-1]
        name, best = max(leaks["tests"].items(), key=lambda test: test[1]["auc"][stage]["value"] or 0)
        said.append(
            f"Of {len(leaks['tests'])} membership tests the best ({SCORES[name].title}) tells these "
            f"{'texts' if leaks['apart'] else 'passages'} from {counted(leaks['nonmembers'], 'other')} with an AUC of "
            f"{_estimate(best['auc'][stage], '{:.3f}')}; 0.5 would tell nothing."
        )
    return said


def not_measured(audit: Audit, why: str) -> list[str]:
    """What a reader must not take for granted.

    Args:
        why: Nothing is said of the model before its edit, if that is so.
    """
    texts = audit["texts"]
    cut = texts["prefix_len"]
    near = audit["near_ties"]
    edits = audit["sampling"]["near_verbatim"]
    facts = (
        (cut, f"The first {cut} tokens of each text, and an end shorter than a suffix: not asked for."),
        (texts["left_out"], f"{counted(texts['left_out'], 'text')} too short to be asked for."),
        (True, "Other prompts: a passage was asked for by the tokens that stand before it, and by no others."),
        (not edits, "Samples that are nearly the text (--near-verbatim N)."),
        (True, "Paraphrases, and translations."),
        (audit["leaks"] is None, "Whether a test can tell that a text was trained on (--nonmembers)."),
        (not audit["heldout"], "How well the model works on other text: no held-out text was given."),
        (why, f"What the edit changed: {why}."),
        (True, "Attacks that change the model: fine-tuning, quantization, merging."),
        (audit["before"], "The edit disrupts recall of these texts; that is no proof of deletion."),
        (True, "Texts other than these."),
        (near, f"{near:,} greedy verdicts hang on logits that are equal within the model's precision."),
    )
    return [text for holds, text in facts if holds]


def _of_tries(audit: Audit, found: Mapping[str, int]) -> str:
    texts = audit["texts"]
    n_texts = texts["n_texts"]
    n_passages = texts["n_passages"]
    many = found["passages@1000"]
    few = found["passages@10"]
    greedy = f"Greedy decoding recites {_number(found['strict'])}."
    if n_passages > n_texts:
        if not many:
            return f"Nothing of {counted(n_texts, 'text')} ({n_passages:,} passages) comes out in 1,000 tries. {greedy}"
        return (
            f"Something of {found['texts@1000']:,} of {counted(n_texts, 'text')} comes out word for word in 1,000 "
            f"tries: {many:,} of {n_passages:,} passages; {_number(few)} of them in 10. {greedy}"
        )
    if not many:
        return f"None of {counted(n_texts, 'text')} comes out word for word in 1,000 tries. {greedy}"
    comes = "comes" if many == 1 else "come"
    return (
        f"{many:,} of {counted(n_texts, 'text')} {comes} out word for word in 1,000 tries; {_number(few)} of them in "
        f"10. {greedy}"
    )


def _number(count: int) -> str:
    return f"{count:,}" if count else "none"


def figures_table(audit: Audit) -> Table:
    """The figures for a terminal."""
    found = Table(box=box.SIMPLE_HEAD)
    header, rows = _rows(audit)
    found.add_column(literal(header[0]), overflow="fold", min_width=20)
    for name in header[1:]:
        found.add_column(literal(name), justify="right", no_wrap=True)
    for row in rows:
        found.add_row(*map(literal, row))
    return found


def _rows(audit: Audit, names: Sequence[str] = tuple(TITLES)) -> tuple[list[str], list[list[str]]]:
    """Every figure in every stage with its interval, and how it changed."""
    stages = audit["figures"]
    apart = audit["texts"]["n_passages"] > audit["texts"]["n_texts"]  # else they are the same
    wanted = [name for name in names if apart or not name.startswith("passages@")]
    known = [name for name in wanted if any(name in figures for figures in stages.values())]
    header = ["with 95 % intervals", *stages, *(["change"] if audit["changes"] else [])]
    rows = []
    for name in known:
        row = [TITLES[name], *(_estimate(figures.get(name), "{:.3f}") for figures in stages.values())]
        rows.append([*row, _estimate(audit["changes"].get(name), "{:+.3f}")] if audit["changes"] else row)
    return header, rows


def _estimate(found: Mapping[str, float | None] | None, style: str) -> str:
    """A figure with its interval: n/a where a single text gives none, left out where all texts have the same."""
    if found is None or found["value"] is None:
        return ""
    value = style.format(found["value"])
    low = found["low"]
    high = found["high"]
    if low is None or high is None:
        return f"{value} [n/a]"
    return value if low == high else f"{value} [{style.format(low)}, {style.format(high)}]"


def audit_page(audit: Audit, strips: Sequence[Strip]) -> str:
    """The whole page.

    Args:
        audit: What ``audit.json`` holds, and ``excerpts``.
        strips: Of the texts that are longer than a passage.
    """
    parts = [
        section("Verdict", *(f"<p><b>{as_html(text)}</b></p>" for text in verdict(audit)[:1]), *_rest(audit)),
        section(
            "What comes out", table(*_rows(audit, [name for name in TITLES if name not in GENERAL])), *_curve(audit)
        ),
        _map(strips),
        _excerpts(audit),
        _leaks(audit),
        _general(audit),
        section("How it was measured", bullets(_settings(audit))),
        section("Not measured", bullets(audit["not_measured"])),
        section("Reproduce", preformatted(audit["command"])),
    ]
    return page(f"{TITLE} {audit['model']}", parts)


def _rest(audit: Audit) -> list[str]:
    return [paragraph(text) for text in verdict(audit)[1:]]


def _curve(audit: Audit) -> list[str]:
    curve = audit["curve"]
    intervals = {
        stage: {"intervals": {f"texts/extraction.expected_at.{n}": _ends(figures[f"expected@{n}"]) for n in TRIES}}
        for stage, figures in audit["figures"].items()
    }
    drawn = extraction_figure(curve["tries"], {"texts": curve["expected"]}, intervals)
    return [
        figure(drawn, "expected share of the passages over the number of samples of each"),
        paragraph(
            "Shares of texts, and greedy recitation where each is one passage: Wilson; other figures: a bootstrap over "
            "texts; changes: a paired bootstrap; n/a: of a single text there is none.",
            note=True,
        ),
    ]


def _ends(found: Mapping[str, float | None]) -> list[float | None]:
    return [found["low"], found["high"]]


def _map(strips: Sequence[Strip]) -> str:
    if not strips:
        return ""
    return section(
        "Where it comes out",
        figure(
            strips_figure(strips), "texts as strips, coloured by how likely a sample holds the passage that lies there"
        ),
        paragraph(
            "A place has the colour of the passage whose suffix lies there. White: no suffix lies there, as in the "
            "first tokens of each text. Drawn are the texts of which most comes out.",
            note=True,
        ),
    )


def _excerpts(audit: Audit) -> str:
    parts = []
    for found in audit["excerpts"]:
        chances = ", ".join(f"{stage}: {_tries(p)}" for stage, p in found["log10_p"].items())
        parts.append(
            f"<h3>{as_html(found['name'])}</h3><p class=note>{as_html(chances)}</p><blockquote>"
            f"{as_html(found['prefix'])}<mark>{as_html(found['suffix'])}</mark></blockquote>"
        )
    if not parts:
        return ""
    note = "Those that come out, and the likeliest; marked is what the model is asked for, before it what it is given."
    return section("Passages", paragraph(note, note=True), *parts)


def _tries(log10_p: float | None) -> str:
    if log10_p is None:
        return "cannot be drawn"
    return f"p = {10**log10_p:.2g}" if log10_p > -100 else f"p = 1e{log10_p:.0f}"


def _leaks(audit: Audit) -> str:
    found = audit["leaks"]
    if found is None:
        return ""
    stages = list(audit["figures"])
    columns = [*stages, "change"] if audit["changes"] else stages
    header = ["membership test", *(f"AUC, {name}" for name in columns), *(f"found, {name}" for name in stages)]
    rows = []
    for name, each in found["tests"].items():
        aucs = [_estimate(each["auc"].get(stage), "{:+.3f}" if stage == "change" else "{:.3f}") for stage in columns]
        rows.append([SCORES[name].title, *aucs, *(f"{each['tpr'][stage]['value']:.3f}" for stage in stages)])
    what = "texts" if found["apart"] else "passages, of which several are of one text, so that no interval is known"
    note = (
        f"{found['members']} members and {found['nonmembers']} non-members: {what}. AUC: the chance that a member "
        "scores above a non-member, 0.5 tells nothing; found: members found at 1 % false alarms. It says something of "
        "training only where both were drawn in the same way."
    )
    return section("Can a membership test tell?", table(header, rows), paragraph(note, note=True))


def _general(audit: Audit) -> str:
    header, rows = _rows(audit, GENERAL)
    if not rows:
        return ""
    note = f"Held-out text: {audit['heldout']}."
    return section("How well it still works", table(header, rows), paragraph(note, note=True))


def _settings(audit: Audit) -> list[str]:
    scheme = audit["sampling"]
    texts = audit["texts"]
    cut = (
        "as the rows say"
        if texts["prefix_len"] is None
        else f"prefixes of {texts['prefix_len']}, suffixes of {texts['suffix_len']}"
    )
    said = [
        f"Model: {audit['model']}" + (f", an edit of {audit['before']}" if audit["before"] else ""),
        f"Texts: {texts['source']}: {texts['told']}; tokens: {cut}",
        f"Sampling: temperature {scheme['temperature']}, top-k {scheme['top_k']}, top-p {scheme['top_p']}. p is the "
        "product over the suffix of each token's probability, from one teacher-forced forward (Hayes et al., arXiv "
        "2410.19482); nothing was sampled.",
        f"A passage comes out in n tries where 1 - (1 - p)^n is {audit['chance']} or more.",
    ]
    if scheme["near_verbatim"]:
        said.append(
            f"Nearly word for word: within {scheme['near_verbatim']} token edits; a lower bound by {scheme['beams']} "
            "beams (arXiv 2603.24917)."
        )
    return said
