"""The sections of a report, each from what the run folder holds."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_kfac.console import command_line
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
from lightning_kfac.reporting.competitors import comparison_lines, header, method_rows, needs_lines, strength
from lightning_kfac.reporting.escape import as_html
from lightning_kfac.reporting.figures.comparison import extraction_figure, loss_change_figure, metrics_figure
from lightning_kfac.reporting.figures.pareto import pareto_figure
from lightning_kfac.reporting.figures.price import price_figure
from lightning_kfac.reporting.figures.recovery import recovery_figure
from lightning_kfac.reporting.labels import (
    METRICS,
    OF_EXTRACTION,
    OF_EXTRACTION_OPTIONS,
    OF_LEAKS,
    SWEEP_COLUMNS,
    is_drawn,
    is_telling,
    measured_leaks,
)
from lightning_kfac.reporting.page import Html, bullets, figure, image, paragraph, preformatted, section, table
from lightning_kfac.reporting.run import Run
from lightning_kfac.reporting.spectra_board import spectrum_figures


def summary(run: Run) -> str:
    """What this is, in a few lines."""
    model = next((row["model"] for row in run.results if row.get("model")), None)
    facts = [
        f"Folder: {run.path}",
        f"Model: {model}" if model else "",
        f"Command: {_command(run)}" if _command(run) else "",
        f"Begun {run.status.get('started')}, {_end(run)}" if run.status else "",
        f"lightning_kfac {run.status.get('version') or _first(run, 'version')}",
    ]
    return section("Run", bullets([fact for fact in facts if fact]))


def data(run: Run) -> str:
    """Which text was collected and measured."""
    facts = []
    if run.factors is not None:
        about = run.factors.metadata
        facts.append(
            f"Curvature: {about.get('n_tokens', 0):,} token positions of {about.get('corpus')}; "
            + ", ".join(f"{key} {about[key]}" for key in ("labels", "precision", "seed", "world_size") if key in about)
        )
    for row in list(run.results)[-1:]:
        measured = row.get("measured") or {}
        if measured.get("heldout"):
            facts.append(
                f"Perplexity and nDCG: {measured['heldout_tokens']:,} tokens of {measured['heldout']}, in rows of "
                f"{measured['seq_len']} tokens (another packing gives another value)"
            )
        facts += [
            f"{key[: -len('n_sequences')].rstrip('/') or 'memorized'}: {value} sequences"
            for key, value in row.items()
            if key.endswith("n_sequences")
        ]
    return section("Data", bullets(facts))


def comparison(run: Run) -> str:
    """Figures of every stage with intervals and changes."""
    stages = {} if run.is_grid else run.stages
    if not stages:
        return ""
    rows = [name for name, label in METRICS.items() if not label.aside]
    if not any(key.rpartition("/")[2] in rows for row in stages.values() for key in row):
        return ""
    parts = [_stages_table(stages, rows)]
    if len(stages) > 1:
        parts.append(paragraph("Rates: Wilson; other figures: bootstrap; changes: paired bootstrap.", note=True))
        if is_drawn(stages.values()):
            parts.append(figure(metrics_figure(stages), "figures of every stage with their intervals"))
    if counts := run.comparison.get("loss_change"):
        parts.append(figure(loss_change_figure(run.comparison["edges"], counts), "changes of token losses"))
    return section("Before and after" if len(stages) > 1 else "Results", *parts)


def extraction(run: Run) -> str:
    """What somebody gets out who samples, over the number of tries."""
    stages = {} if run.is_grid else run.stages
    if not any(key.rpartition("/")[2] in OF_EXTRACTION for row in stages.values() for key in row):
        return ""
    row = list(stages.values())[-1]
    scheme = ", ".join(f"{name} {row.get(f'extraction.{name}')}" for name in ("temperature", "top_k", "top_p"))
    parts = [
        paragraph(f"Sampling: {scheme}. p: the probability that one sample holds a sequence word for word."),
        _stages_table(stages, [*OF_EXTRACTION, *OF_EXTRACTION_OPTIONS]),
    ]
    if curves := run.extraction.get("curves"):
        drawn = extraction_figure(run.extraction["tries"], curves, stages)
        parts.insert(1, figure(drawn, "expected share extracted over the number of samples"))
    return section("Extraction by sampling", *parts)


def leaks(run: Run) -> str:
    """Whether texts that the model was trained on can be told from others."""
    stages = {} if run.is_grid else run.stages
    measures = measured_leaks(stages.values())
    if not measures:
        return ""
    row = list(stages.values())[-1]
    text = (
        f"{row.get('leaks.members')} members, {row.get('leaks.nonmembers')} non-members; Min-K of the least likely "
        f"{row.get('leaks.k'):.0%} of the tokens. AUC: the chance that a member scores above a non-member, 0.5 tells "
        "nothing. A difference says only as much as the two sets were drawn in the same way."
    )
    keys = [f"{OF_LEAKS[name]}.{what}" for name in measures for what in ("auc", TPR)]
    parts = [paragraph(text), _stages_table(stages, keys)]
    if any(row.get(BY_LAYER) for row in stages.values()):
        parts += [paragraph("AUC of the share in flat directions, by layer; of a random basis:"), _by_layer(stages)]
    return section("Members against non-members", *parts)


def _by_layer(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """AUCs of bulk shares of each layer, in its basis and in a random one, at every stage."""
    columns = [row.get(key) or {} for row in stages.values() for key in (BY_LAYER, BY_LAYER_RANDOM)]
    header = ["layer", *(name for stage in stages for name in (stage, f"{stage}, random"))]
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
    return section("What edits will cost", paragraph(text), table(header, body), drawn)


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
    parts = [paragraph(text), table([*ATTACKS_HEADER, *NEARLY.values()], body)]
    if recovery_curves(rows):
        drawn = recovery_figure(rows, "what relearning brings back")
        parts.append(figure(drawn, "recovery over the steps of relearning"))
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
        table(["method", *header(run.results)], _lines(comparison_lines(run.results, target))),
        table(["method", *titles], _lines(lines)),
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
    header = ["with 95 % intervals", *stages]
    if changes:
        header += [f"change, {stage}" if len(changes) > 1 else "change" for stage in changes]
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
    for number, example in enumerate(run.comparison.get("examples", []), start=1):
        after = example["after"]
        rest = example.get("diverging", "")
        same = after[: len(after) - len(rest)] if rest and after.endswith(rest) else after
        marked = f"{as_html(same)}<mark>{as_html(rest)}</mark>" if same != after else as_html(after)
        lines = [f"<b>{name}</b> {as_html(example[name])}" for name in ("prefix", "gold", "before")]
        parts.append(
            f"<h3>{number}</h3><blockquote>" + "<br>".join([*lines, f"<b>after</b> {marked}"]) + "</blockquote>"
        )
    return section("Continuations", *parts)


def grid(run: Run) -> str:
    """All edits of a sweep or a scan."""
    if not run.is_grid:
        return ""
    rows = sweep.average_seeds(run.results)
    keys = [key for key in rows[0] if key.split("/")[-1] in SWEEP_COLUMNS and rows[0][key] is not None]
    body = []
    for row in sorted(rows, key=lambda row: (row["edit"] is not None, row.get("strict_acc") or 0)):
        about = row["edit"]
        cells = ["unedited", "", "", "", ""]
        if about:
            kept = [f"{about['fraction_kept']:.1%}", f"{about['relative_change']:.2f}"]
            cells = [edit_label(about), edit_place(about), f"{about['rho']:g}", *kept]
        body.append([*cells, *(_figure(row, key) for key in keys)])
    header = ["edit", "where", "rho", "kept", "change", *(_name(key) for key in keys)]
    if run.scan.is_file():
        drawn = image(run.scan.read_bytes(), "scan of blocks and projections")
    else:
        drawn = figure(pareto_figure(rows, "what each edit costs, and what it suppresses"), "Pareto figure")
    return section("Edits", drawn, table(header, body))


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


def findings(run: Run) -> str:
    """What else the run found: mining, a recommendation, a study of attention."""
    parts = []
    if mined := run.findings.get("mining"):
        parts.append(table(["search", ""], [[key, str(value)] for key, value in mined.items()]))
        if run.windows.is_file():
            parts.append(image(run.windows.read_bytes(), "where documents come out, along their tokens"))
    if advised := run.findings.get("recommended"):
        setting = {key: advised[key] for key in ("blocks", "projections", "rho")}
        parts.append(paragraph(f"Recommended (chosen on one half of the sequences): {setting}. On the other half:"))
        stages = dict(zip(("baseline", "edited"), advised["reporting"], strict=True))
        keys = [key for key in stages["edited"] if key in METRICS and is_telling(key, stages.values())]
        rows = [[_name(key), *(_figure(row, key) for row in stages.values())] for key in keys]
        parts.append(table(["", *stages], rows))
    if study := run.findings.get("crystallization"):
        parts += [paragraph(study["verdict"]), *_attention_tables(study)]
    if profile := run.findings.get("bands"):
        text = f"Band profile against {profile['against']}; {profile['statistic']}; positions: {profile['n_positions']}"
        pngs = sorted(run.path.glob("ratios_*.png")) + sorted(run.path.glob("bands_*.png"))
        parts += [paragraph(text), *(image(png.read_bytes(), png.stem) for png in pngs)]
    return section("Findings", *parts)


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
        modes.append([name, f"{cost['perplexity']:.3f}", change, back])
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

    def has(name: str) -> bool:
        return any(row.get(name) is not None for row in rows)

    missing = [
        (has("strict_acc"), "Recitation: no memorized set was given."),
        (has("perplexity"), "General ability: no held-out text was given."),
        (has("ndcg@10"), "nDCG@10: no unedited model to compare with."),
        (any("differences" in row and row["differences"] for row in rows), "Changes: no baseline was evaluated."),
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
        texts.append(f"{near} verdicts hang on logits that are equal within the model's precision.")
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
    return section("Reproduce", preformatted("\n".join(commands)), preformatted(run.config) if run.config else "")


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


# Of the page.
ORDER = (
    summary,
    comparison,
    extraction,
    leaks,
    prices,
    abilities,
    attacks,
    methods,
    findings,
    grid,
    examples,
    edit,
    spectra,
    data,
    not_measured,
    reproduce,
)
