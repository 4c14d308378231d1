"""The sections of a report, each from what the run folder holds."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_kfac.console import command_line, counted
from lightning_kfac.editing import sweep
from lightning_kfac.editing.formulas import is_product
from lightning_kfac.editing.report import edit_label, edit_place
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.spectra import layer_spectrum
from lightning_kfac.metrics.leaks import BY_LAYER, BY_LAYER_RANDOM, TPR
from lightning_kfac.models.targets import layer_label
from lightning_kfac.reporting.abilities import abilities_section
from lightning_kfac.reporting.attacks import HEADER as ATTACKS_HEADER
from lightning_kfac.reporting.attacks import NEARLY, Cell, attack_lines, attack_rows, recovery_curves
from lightning_kfac.reporting.commands import apply_words
from lightning_kfac.reporting.competitors import comparison_lines, header, method_rows, needs_lines, strength
from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.figures.comparison import extraction_figure, loss_change_figure, metrics_figure
from lightning_kfac.reporting.figures.pareto import pareto_figure
from lightning_kfac.reporting.figures.price import price_figure
from lightning_kfac.reporting.figures.recovery import recovery_figure
from lightning_kfac.reporting.figures.scan import scan_figure, scan_values
from lightning_kfac.reporting.headline import headline, in_words, setting
from lightning_kfac.reporting.labels import (
    INTERVALS,
    METRICS,
    OF_EXTRACTION,
    OF_EXTRACTION_OPTIONS,
    OF_LEAKS,
    SWEEP_COLUMNS,
    is_drawn,
    is_telling,
    legend,
    measured_leaks,
    stage_label,
)
from lightning_kfac.reporting.page import (
    Html,
    bullets,
    described,
    details,
    figure,
    image,
    paragraph,
    preformatted,
    sampling,
    section,
    table,
)
from lightning_kfac.reporting.run import Run
from lightning_kfac.reporting.spectra_board import spectrum_figures
from lightning_kfac.reporting.tables import SHOWN

COLLECTED = {"labels": "labels", "precision": "precision", "seed": "seed", "world_size": "ranks"}


def subject(run: Run) -> str:
    """Which models were measured."""
    rows = [*run.results, *run.findings.values(), run.forecast]
    names = {row.get("stage", ""): row["model"] for row in rows if row.get("model")}
    several = len(set(names.values())) > 1
    shown = {
        name: f"{stage_label(stage)} model: {name}" if several and stage else str(name) for stage, name in names.items()
    }
    if not shown:
        return ""
    about = "" if several else "Model: "
    edited = "; edited in this run" if run.edit and not several else ""
    return paragraph(about + "; ".join(shown.values()) + edited, note=True)


OF_IMAGES_NOT_MEASURED = [
    "Whether wrong labels come back with more training. The edit disrupts recall; it is no proof of deletion.",
    "Other seeds, other images and larger models: one run.",
]


def summary(run: Run) -> str:
    """What was run, in a few lines."""
    begun = run.status.get("started")
    version = (
        run.status.get("version")
        or _first(run, "version")
        or next((found["version"] for found in run.findings.values() if found.get("version")), None)
    )
    facts = [
        f"Folder: {run.path}",
        f"Command: {_command(run)}" if _command(run) else "",
        ", ".join(filter(None, [f"Begun {begun}" if begun else "", _end(run)])) if run.status else "",
        f"lightning_kfac {version}" if version else "",
    ]
    return section("Run", bullets([fact for fact in facts if fact]))


def data(run: Run) -> str:
    """Which text was collected and measured."""
    facts = []
    if run.factors is not None:
        about = run.factors.metadata
        facts.append(
            f"Curvature: {counted(about.get('n_tokens', 0), 'token position')} of {about.get('corpus') or 'a text'}; "
            + ", ".join(f"{name} {about[key]}" for key, name in COLLECTED.items() if about.get(key) is not None)
        )
    for row in list(run.results)[-1:]:
        measured = row.get("measured") or {}
        if measured.get("heldout"):
            facts.append(
                f"Perplexity and nDCG: {measured['heldout_tokens']:,} tokens of {measured['heldout']}, in rows of "
                f"{measured['seq_len']} tokens (another packing gives another value)"
            )
        facts += [
            f"{key[: -len('n_sequences')].rstrip('/') or 'memorized'}: {counted(value, 'sequence')}"
            for key, value in row.items()
            if key.endswith("n_sequences")
        ]
    return section("Texts", bullets(facts))


def comparison(run: Run) -> str:
    """Figures of every stage with intervals and changes."""
    stages = {} if run.is_grid else run.stages
    if not stages:
        return ""
    rows = [name for name, label in METRICS.items() if not label.aside]
    if not any(key.rpartition("/")[2] in rows for row in stages.values() for key in row):
        return ""
    meanings = [*legend(stages.values()), f"in brackets: {INTERVALS}"]
    return section(
        "Before and after" if len(stages) > 1 else "Results",
        _stages_table(stages, rows),
        details("What the words mean", bullets(meanings)),
    )


def pictures(run: Run) -> str:
    """Before and after at a glance."""
    stages = {} if run.is_grid or run.attacks or run.compared else run.stages
    parts = []
    if len(stages) > 1 and is_drawn(stages.values()):
        parts.append(figure(metrics_figure(stages), CHANGES))
    if curves := run.extraction.get("curves") if stages else None:
        drawn = extraction_figure(run.extraction["tries"], curves, stages)
        parts.append(figure(drawn, "What somebody gets who samples: expected share over the number of samples."))
    if counts := run.comparison.get("loss_change"):
        drawn = loss_change_figure(run.comparison["edges"], counts)
        parts.append(figure(drawn, "What happened to the loss of each token of the held-out text."))
    return section("In pictures", *parts)


CHANGES = (
    "Left: each figure of both models with its 95 % interval, an arrow from before to after. Right: its change with "
    "the interval of a paired bootstrap; one that leaves out 0 is more than chance."
)


def extraction(run: Run) -> str:
    """What somebody gets out who samples, over the number of tries."""
    stages = {} if run.is_grid else run.stages
    if not any(key.rpartition("/")[2] in OF_EXTRACTION for row in stages.values() for key in row):
        return ""
    row = list(stages.values())[-1]
    scheme = {name: row.get(f"extraction.{name}") for name in ("temperature", "top_k", "top_p")}
    parts = [
        paragraph(f"Sampling: {sampling(scheme)}. p: the probability that one sample holds a sequence word for word."),
        _stages_table(stages, [*OF_EXTRACTION, *OF_EXTRACTION_OPTIONS]),
    ]
    return section("Extraction by sampling", *parts)


def leaks(run: Run) -> str:
    """Whether texts that the model was trained on can be told from others."""
    stages = {} if run.is_grid else run.stages
    measures = measured_leaks(stages.values())
    if not measures:
        return ""
    row = list(stages.values())[-1]
    text = (
        f"{counted(row['leaks.members'], 'member')}, {counted(row['leaks.nonmembers'], 'non-member')}; Min-K of "
        f"the least likely {row.get('leaks.k'):.0%} of the tokens. AUC: the chance that a member scores above a "
        "non-member, 0.5 tells nothing. A difference says only as much as the two sets were drawn in the same way."
    )
    keys = [f"{OF_LEAKS[name]}.{what}" for name in measures for what in ("auc", TPR)]
    parts = [paragraph(text), _stages_table(stages, keys)]
    if any(row.get(BY_LAYER) for row in stages.values()):
        parts += [paragraph("AUC of the share in flat directions, by layer; of a random basis:"), _by_layer(stages)]
    return section("Members against non-members", *parts)


def _by_layer(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """AUCs of bulk shares of each layer, in its basis and in a random one, at every stage."""
    columns = [row.get(key) or {} for row in stages.values() for key in (BY_LAYER, BY_LAYER_RANDOM)]
    names = [stage_label(stage) for stage in stages]
    header = ["layer", *(title for name in names for title in (name, f"{name}, random"))]
    rows = []
    for layer in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(layer) for column in columns]
        rows.append([layer_label(layer), *("n/a" if value is None else f"{value:.3f}" for value in values)])
    return table(header, rows)


def prices(run: Run) -> str:
    """What edits will cost, as ``forecast`` predicted it."""
    records = run.forecast.get("edits", [])
    if not records:
        return ""
    text = (
        f"Change of the loss on {run.forecast.get('text')}, nats a token, predicted before any edit was made: to first "
        "and second order from one pass over the text, and the second order by what was collected alone (diagonal)."
    )
    measured = ["measured"] if "measured" in records[0] else []
    body = [
        [
            edit_label(record["edit"]),
            f"{record['edit']['rho']:g}",
            f"{record['edit']['fraction_kept']:.1%}",
            *(f"{record['predicted'][name]:+.4f}" for name in ("first", "second", "total")),
            *(f"{record[name]:+.4f}" for name in measured),
            f"{record['diagonal']:+.4f}",
        ]
        for record in records
    ]
    header = ["edit", "rho", "kept", "first", "second", "predicted", *measured, "diagonal"]
    drawn = figure(price_figure(records, str(run.forecast.get("text"))), "predicted cost over the share that is kept")
    return section("What edits will cost", drawn, paragraph(text), table(header, body))


def attacks(run: Run) -> str:
    """What survives of the edit under attack."""
    return attack_results(run.attacks)


def attack_results(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of rows of the command ``attack``, for any page; empty where there are none.

    Args:
        rows: Stages ``baseline``, ``edited`` and ``attacked``.
    """
    if not attack_rows(rows):
        return ""
    text = (
        "Share of the sequences got word for word, on the half of the set that no attack sees. Recovered: (attacked - "
        "edited) / (unedited - edited), with a paired bootstrap over the sequences; the last columns have the same of "
        "near recitation. Perplexity on held-out text: an attack that raises it much has broken the model rather than "
        "brought anything back."
    )
    body = [[line.label, *map(_cell, (*line.cells, *line.nearly))] for line in attack_lines(rows)]
    parts = [paragraph(text), table([*ATTACKS_HEADER, *NEARLY.values()], body, stacked=True)]
    if recovery_curves(rows):
        drawn = recovery_figure(rows, "what relearning brings back")
        parts.insert(0, figure(drawn, "What comes back: recovery over the steps of relearning."))
    return section("What survives attacks", *parts)


def abilities(run: Run) -> str:
    """What is left of each ability."""
    return abilities_section(run.findings.get("abilities", {}))


def methods(run: Run) -> str:
    """Other ways to suppress, each at the weakest strength that does, and every strength that was tried."""
    if not run.compared:
        return ""
    target = run.compared["target"]
    text = (
        f"Each method at the weakest strength that brings strict accuracy to {target:g} or less on the half that chose "
        "it (its half), by perplexity. The other half was seen by none; further sets are of other sources. In 1,000: "
        "the expected share extracted in as many samples. Change: of the weights' norm, mean over layers. Recovered: "
        "(attacked - edited) / (unedited - edited), on the other half."
    )
    titles, lines = needs_lines(run.results, target, run.attacked)
    parts = [
        paragraph(text),
        table(["method", *header(run.results)], _lines(comparison_lines(run.results, target)), stacked=True),
        table(["method", *titles], _lines(lines), stacked=True),
    ]
    if command := run.compared.get("command"):
        parts += [paragraph(f"Recommended; {run.compared['expected']}:"), preformatted(command)]
    names = ["choosing/strict_acc", "strict_acc", "perplexity", "ndcg@10"]
    every = [
        [f"{label}, {strength(row)}", *("n/a" if row.get(key) is None else f"{row[key]:.3f}" for key in names)]
        for label, rows in method_rows(run.results).items()
        for row in rows
    ]
    parts += [paragraph("All strengths:"), table(["method", "its half", "other half", "perplexity", "nDCG"], every)]
    return section("Methods at matched forgetting", *parts)


def _lines(lines: Sequence[tuple[str, Sequence[Cell]]]) -> list[list[str]]:
    return [[label, *map(_cell, cells)] for label, cells in lines]


def _cell(cell: Cell) -> str:
    bounds = f' <span class="interval">[{as_html(cell.bounds)}]</span>' if cell.bounds else ""
    return Html(as_html(cell.text) + bounds)


def _stages_table(stages: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> str:
    """Figures of these names in every stage, and how they changed."""
    keys = [key for key in dict.fromkeys(k for row in stages.values() for k in row) if key.rpartition("/")[2] in names]
    rows = [[_name(key), *(_figure(row, key) for row in stages.values())] for key in keys]
    changes = [stage for stage, row in stages.items() if row.get("differences")]
    header = ["with 95 % intervals", *map(stage_label, stages)]
    if changes:
        header += [f"change, {stage_label(stage)}" if len(changes) > 1 else "change" for stage in changes]
        for key, row in zip(keys, rows, strict=True):
            row += [_change(stages[stage], key) for stage in changes]
    return table(header, rows)


def edit(run: Run) -> str:
    """What the edit did to each layer."""
    layers = run.edit.get("layers", [])
    header = ["layer", "formula", "rho", "kept", "of", "share", "norm before", "after", "relative change"]
    rows = [
        [
            layer_label(x["name"]),
            x["formula"],
            f"{x['rho']:g}",
            f"{x['n_kept']:,}",
            f"{x['n_total']:,}",
            f"{x['fraction_kept']:.1%}",
            f"{x['norm_before']:.4g}",
            f"{x['norm_after']:.4g}",
            f"{x['relative_change']:.3f}",
        ]
        for x in layers
    ]
    return section("Edit", table(header, rows) if rows else "")


def examples(run: Run) -> str:
    """Continuations before and after; what diverges is marked."""
    parts = []
    last = stage_label(([*run.stages] or ["edited"])[-1])
    for number, example in enumerate(run.comparison.get("examples", []), start=1):
        after = example["after"]
        rest = example.get("diverging", "")
        same = after[: len(after) - len(rest)] if rest and after.endswith(rest) else after
        marked = f"{as_html(same)}<mark>{as_html(rest)}</mark>" if same != after else as_html(after)
        lines = [f"<b>{SHOWN[name]}</b> {as_html(example[name])}" for name in ("prefix", "gold", "before")]
        lines.append(f"<b>{as_html(last)}</b> {marked}")
        parts.append(f"<h3>{number}</h3><blockquote>" + "<br>".join(lines) + "</blockquote>")
    note = paragraph("Marked: where the changed model leaves the true continuation.", note=True) if parts else ""
    return section("Continuations", note, *parts)


def grid(run: Run) -> str:
    """All edits of a sweep or a scan: the figure, each edit with what it makes of a text, and the table."""
    if not run.is_grid:
        return ""
    rows = sweep.average_seeds(run.results)
    rows.sort(key=lambda row: (row["edit"] is not None, row.get("strict_acc") or 0))
    keys = [key for key in rows[0] if key.split("/")[-1] in SWEEP_COLUMNS and rows[0][key] is not None]
    body = []
    for row in rows:
        about = row["edit"]
        cells = ["unedited", "", "", "", ""]
        if about:
            kept = [f"{about['fraction_kept']:.1%}", f"{about['relative_change']:.2f}"]
            cells = [edit_label(about), edit_place(about), f"{about['rho']:g}", *kept]
        body.append([*cells, *(_figure(row, key) for key in keys)])
    header = ["edit", "where", "rho", "kept", "change", *map(_short_name, keys)]
    drawn = scan_heat(run, rows) if run.is_scan else _pareto(rows)
    return section("Edits", drawn, table(header, body, stacked=True), _points(run, rows))


def _pareto(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure, whose points lead to the edits below it."""
    links = {number: f"#{_point(number)}" for number, row in enumerate(rows) if row["edit"]}
    drawn = pareto_figure(rows, "what each edit costs, and what it suppresses", links, width=7.4)
    tips = {_point(number): _figures_in_words(row) for number, row in enumerate(rows)}
    return figure(drawn, "Pareto figure: each point is an edit, its number is rho, and a click leads to it.", tips)


def _points(run: Run, rows: Sequence[Mapping[str, Any]]) -> str:
    """Every edit: setting, figures, what it makes of a text, and the command that makes it."""
    parts = []
    for number, row in enumerate(rows):
        if not row["edit"]:
            continue
        facts = {"setting": setting(row["edit"]), "figures": _figures_in_words(row)}
        if example := row.get("example"):
            facts |= {"prefix": example["prefix"], SHOWN["gold"]: example["gold"], "its continuation": example["after"]}
        if command := _apply_command(run, row["edit"]):
            facts["command"] = Html(f"<code>{as_html(command)}</code>")
        parts.append(details(setting(row["edit"]), described(facts), name=_point(number)))
    return "<h3>Each edit</h3>" + "".join(parts) if parts else ""


def _point(number: int) -> str:
    return f"edit-{number}"


def _figures_in_words(row: Mapping[str, Any]) -> str:
    """Of one edit: ``strict 0.030, perplexity 74.78``."""
    known = [name for name in SWEEP_COLUMNS if row.get(name) is not None]
    texts = [f"{SWEEP_COLUMNS[name][0]} {SWEEP_COLUMNS[name][1].format(row[name])}" for name in known]
    return ", ".join([*([setting(row["edit"])] if row["edit"] else ["unedited"]), *texts])


def _apply_command(run: Run, edit: Mapping[str, Any]) -> str:
    """What makes an edit of a sweep or scan; empty where more than its options decide."""
    factors = run.settings.get("factors")
    plain = edit.get("mode") == "suppress" and not edit.get("alpha") and not edit.get("layers")
    if not (factors and plain and edit.get("blocks") and edit.get("projections")):
        return ""
    words = apply_words(edit, factors, run.settings.get("model"), f"{run.path}-edited")
    return command_line("apply", *words)


def scan_heat(run: Run, rows: Sequence[Mapping[str, Any]]) -> str:
    """Heat maps of a scan with the recommendation framed; from the PNG where the results do not give them."""
    found = scan_values(rows)
    if found is None:
        return image(run.scan.read_bytes(), "The scan of blocks and projections.") if run.scan.is_file() else ""
    advised = run.findings.get("recommended")
    chosen = (advised["blocks"], advised["projections"]) if advised else None
    drawn = scan_figure(*found, "one place edited alone", chosen)
    framed = "; framed: recommended." if chosen else "."
    return figure(drawn, "The scan of blocks and projections: what an edit of each alone does" + framed)


def spectra(run: Run) -> str:
    """Spectra of the collected factors, with the cut of the edit."""
    if run.factors is None:
        return ""
    bases = BasisCache.beside(run.factors)
    config = run.edit.get("config", {})
    # Elsewhere what is kept is no staircase in the spectra, or another one.
    plain = config.get("mode") == "suppress" and config.get("budget") in (None, "mass") and not run.edit.get("domains")
    cut = [layer for layer in run.edit.get("layers", []) if plain and is_product(layer["formula"])]
    rhos = {layer["name"]: layer["rho"] for layer in cut}
    found = {}
    for name in run.factors:
        G, A = bases.of(run.factors, name)
        found[name] = layer_spectrum(G.values, A.values, rhos.get(name))
    rows = [
        [
            layer_label(name),
            f"{len(x.lambdas)} x {len(x.mu)}",
            f"{x.rank_A:,.1f}",
            f"{x.rank_G:,.1f}",
            f"{x.condition_A:.1e}",
            f"{x.condition_G:.1e}",
        ]
        for name, x in found.items()
    ]
    header = ["layer", "size", "effective rank A", "effective rank G", "condition A", "condition G"]
    return section("Curvature", table(header, rows), *(figure(drawn, tag) for tag, drawn in spectrum_figures(found)))


MOST_PASSAGES = 20
COUNTED = {
    "windows": "windows looked at",
    "checked": "of these checked by themselves",
    "recited": "recited word for word",
    "repetitions": "of these mere repetitions",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "kept": "kept",
    "near_ties": "verdicts on logits that are equal within the precision",
    "corpus": "text searched",
    "max_tokens": "of it at most tokens",
    "prefix_len": "tokens of a prefix",
    "suffix_len": "tokens of a suffix",
    "stride": "tokens from window to window",
    "dtype": "dtype",
}


def findings(run: Run) -> str:
    """What else the run found: mining, a recommendation, a study of attention, curvature profiles."""
    return "".join((_mining(run), _recommendation(run), _attention(run), _bands(run)))


def _mining(run: Run) -> str:
    mined = run.findings.get("mining")
    if not mined:
        return ""
    parts = []
    if run.windows.is_file():
        parts.append(image(run.windows.read_bytes(), "Where documents come out, along their tokens."))
    known = [(title, mined[key]) for key, title in COUNTED.items() if mined.get(key) is not None]
    parts.append(table(["search", ""], [[title, f"{x:,}" if isinstance(x, int) else str(x)] for title, x in known]))
    return section("What was found", _passages(run, mined), *parts)


def _passages(run: Run, mined: Mapping[str, Any]) -> str:
    """The first texts that were found; what is recited is marked."""
    rows = run.mined(MOST_PASSAGES)
    parts = []
    for row in rows:
        where = f"document {row['document']:,}, from its token {row['offset']:,}" if "document" in row else ""
        parts.append(
            f"<p class=note>{as_html(where)}</p><blockquote>{as_html(row.get('prefix', ''))}"
            f"<mark>{as_html(row.get('suffix', ''))}</mark></blockquote>"
        )
    if not parts:
        return ""
    many = counted(mined.get("kept", len(parts)), "passage")
    note = paragraph(f"The first {len(parts)} of {many}; marked: what the model recites.", note=True)
    return note + "".join(parts[:5]) + (details("more", *parts[5:]) if parts[5:] else "")


def _recommendation(run: Run) -> str:
    advised = run.findings.get("recommended")
    if not advised:
        return ""
    words = in_words(advised["blocks"], advised["projections"], advised["rho"])
    stages = dict(zip(("baseline", "edited"), advised["reporting"], strict=True))
    parts = [figure(metrics_figure(stages), CHANGES)] if is_drawn(stages.values()) else []
    keys = [key for key in stages["edited"] if key in METRICS and is_telling(key, stages.values())]
    rows = [[_name(key), *(_figure(row, key) for row in stages.values())] for key in keys]
    parts += [paragraph(f"{words}, chosen on one half of the sequences. On the other half:")]
    parts += [table(["", *map(stage_label, stages)], rows)]
    if command := _apply_command(run, advised["choosing"].get("edit") or {}):
        parts.append(preformatted(command))
    return section("Recommended", *parts)


def _attention(run: Run) -> str:
    study = run.findings.get("crystallization")
    if not study:
        return ""
    pngs = [(run.path / f"crystallize_{name}.png", title) for name, title in ATTENTION_FIGURES.items()]
    drawn = [image(png.read_bytes(), title) for png, title in pngs if png.is_file()]
    return section("Crystallized attention", *drawn, *_attention_tables(study))


ATTENTION_FIGURES = {
    "curve": "Perplexity over the rank of the residual.",
    "spectra": "How many directions the residuals of each head take.",
    "heads": "Each head: what Top-1 attention costs there alone, and its effective dimension.",
    "sharpness": "Cost of Top-1 in each head over how sharp its attention is.",
}


def _bands(run: Run) -> str:
    profile = run.findings.get("bands")
    if not profile:
        return ""
    counts = ", ".join(f"{text} {counted(count, 'position')}" for text, count in profile["n_positions"].items())
    text = f"Against {profile['against']}; {profile['statistic']}s; of {counts}."
    pngs = sorted(run.path.glob("ratios_*.png")) + sorted(run.path.glob("bands_*.png"))
    pngs += sorted(run.path.glob("whitening_*.png"))
    drawn = [image(png.read_bytes(), png.stem.replace("_", " ")) for png in pngs]
    return section("Bands of curvature", paragraph(text), *drawn)


def _attention_tables(study: Mapping[str, Any]) -> list[str]:
    """Costs of every mode and layer, and the heads, of a study of crystallized attention."""
    recovered = study.get("recovered") or {}
    modes = []
    for name, cost in study["costs"].items():
        share = recovered.get(name.removeprefix("lowrank ")) if name.startswith("lowrank") else None
        change = _with_bounds(
            f"{cost['change']['value']:+.2%}", "{:+.2%}", [cost["change"][k] for k in ("low", "high")]
        )
        back = "" if share is None else _with_bounds(f"{share['value']:.0%}", "{:.0%}", [share["low"], share["high"]])
        modes.append([stage_label(name), f"{cost['perplexity']:.3f}", change, back])
    heads = [
        [
            f"layer {h['layer']} head {h['head']}",
            str(h["effective_dimension"]),
            f"{h['entropy']:.2f}",
            f"{h['top1_mass']:.2f}",
        ]
        for h in study["heads"]
    ]
    return [
        table(["attention", "perplexity", "change", "of the Top-1 loss recovered"], modes),
        table(["head", "effective dimension at 90 %", "entropy, nats", "top-1 mass"], heads),
    ]


def not_measured(run: Run) -> str:
    """What a reader must not take for granted."""
    rows = run.results
    if any("n_wrong" in row for row in rows):
        return section("Not measured", bullets(OF_IMAGES_NOT_MEASURED))

    def has(name: str) -> bool:
        return any(row.get(name) is not None for row in rows)

    missing = [
        (has("strict_acc"), "Recitation: no memorized set was given."),
        (has("perplexity"), "General ability: no held-out text was given."),
        (has("ndcg@10"), "nDCG@10: no unedited model to compare with."),
        (
            any("differences" in row and row["differences"] for row in rows),
            "Changes: the unedited model was not evaluated.",
        ),
        (has("stress/stress_len"), "Position stress: other prompts for the same suffixes were not tried."),
        (any(key.endswith("exact_acc") for row in rows for key in row), "Answers to questions: no set was given."),
        (any(measured_leaks([row]) for row in rows), "Membership: no members and non-members were given."),
        (any(key.endswith("unchanged") for row in rows for key in row), "Text that the model does not recite."),
    ]
    texts = [text for measured, text in missing if not measured] if rows else []
    sampled = any(key.rpartition("/")[2] in OF_EXTRACTION for row in rows for key in row)
    means = "other prompts, fine-tuning, paraphrase" if sampled else "sampling, fine-tuning, paraphrase"
    if run.attacks:
        means = "paraphrase, more training, attacks that are not in the table"
    texts += [
        f"Whether the text can be extracted by other means ({means}): not measured. The edit "
        "disrupts recall of these sequences; it is no proof of deletion.",
        "Other seeds, other texts and other models: one run.",
    ]
    near = sum(row.get(key) or 0 for row in rows for key in row if key.endswith("n_near_ties"))
    if near:
        verdicts = "1 verdict hangs" if near == 1 else f"{near:,} verdicts hang"
        texts.append(f"{verdicts} on logits that are equal within the model's precision.")
    return section("Not measured", bullets(texts))


def reproduce(run: Run) -> str:
    """Commands and the full configuration."""
    commands = []
    if run.config and run.status:
        words = _command(run).split()
        kind = next((word for word in words if word.isalpha() and word not in ("python", "torchrun")), "fit")
        commands.append(command_line(kind, "--config", run.path / "config.yaml"))
    if _command(run):
        commands.insert(0, _command(run))
    commands.append(command_line("report", run.path))
    config = details("The full configuration", preformatted(run.config)) if run.config else ""
    return section("Reproduce", preformatted("\n".join(commands)), config)


def _command(run: Run) -> str:
    """As it was typed; version 0.1 noted the clone's script and left ``python`` out."""
    command = run.status.get("command", "")
    return f"python {command}" if command.startswith(("train.py", "edit.py")) else command


def _end(run: Run) -> str:
    return f"finished {run.status['finished']}" if run.status.get("finished") else "not finished"


def _first(run: Run, key: str) -> Any:
    return next((row[key] for row in run.results if row.get(key)), "")


def _name(key: str) -> str:
    prefix, _, name = key.rpartition("/")
    return f"{prefix}: {METRICS[name][0]}" if prefix else METRICS[name][0]


def _short_name(key: str) -> str:
    """As in the table of a sweep."""
    prefix, _, name = key.rpartition("/")
    return f"{prefix} {SWEEP_COLUMNS[name][0]}".strip()


def _figure(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    style = METRICS[key.rpartition("/")[2]][1]
    return "n/a" if value is None else _with_bounds(style.format(value), style, (row.get("intervals") or {}).get(key))


def _change(row: Mapping[str, Any], key: str) -> str:
    value, *bounds = row["differences"].get(key) or [None]
    style = METRICS[key.rpartition("/")[2]][1].replace(":", ":+")
    return "" if value is None else _with_bounds(style.format(value), style, bounds)


def _with_bounds(text: str, style: str, bounds: list[float | None] | None) -> str:
    if not bounds or bounds[0] == bounds[1] is not None:
        return text
    if None in bounds:
        return Html(f'{as_html(text)} <span class="interval">[n/a]</span>')
    low, high = (style.format(bound) for bound in bounds)
    return Html(f'{as_html(text)} <span class="interval">[{as_html(low)}, {as_html(high)}]</span>')


# Of the page: the answer, pictures, what a text becomes, tables, what is not known, and how it was done.
ORDER = (
    headline,
    subject,
    pictures,
    examples,
    abilities,
    attacks,
    findings,
    grid,
    methods,
    comparison,
    extraction,
    leaks,
    prices,
    edit,
    spectra,
    data,
    not_measured,
    summary,
    reproduce,
)
