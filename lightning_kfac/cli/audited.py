"""What an audit measures, and what it says of that: models before and after an edit, on the same passages."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_kfac.cli.options import open_model
from lightning_kfac.console import command_line, say
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.names import MEMORIZED, NONMEMBERS
from lightning_kfac.data.passages import PREFIX, SUFFIX, Passage, Passages
from lightning_kfac.editing.edited_model import edit_details, find_reference
from lightning_kfac.evaluation.audit import COUNTED, Extractable
from lightning_kfac.math.statistics import Figure, interval, paired_difference
from lightning_kfac.math.strips import Strip, most_extracted, strips_of
from lightning_kfac.metrics.described import Measures, Sampling
from lightning_kfac.metrics.extraction import CURVE
from lightning_kfac.metrics.leaks import OBJECT, TPR
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.reporting.audit_page import GENERAL, not_measured, verdict
from lightning_kfac.reporting.labels import measured_leaks
from lightning_kfac.storage.files import new_file, timestamp
from lightning_kfac.storage.run_folder import STATE

TEXTS = MEMORIZED
DOCUMENTS = "documents"
EXCERPTS = 6
SHOWN_OF_PREFIX = 300
SEQ_LEN = 128


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        model: The model.
        before: The unedited model, where this is an edit of one that can be found.
        why: Where it cannot, why.
        edited: Names of the layers that the edit changed.
    """

    model: ModelSource
    before: ModelSource | None
    why: str
    edited: list[str]

    @property
    def stages(self) -> dict[str, ModelSource]:
        """Models by stage, in order."""
        return {"model": self.model} if self.before is None else {"before": self.before, "after": self.model}


def subject_of(model: ModelSource, vocab_size: int) -> Subject:
    """With the model that ``edit.json`` names, where there is one and it can be found."""
    details = edit_details(model)
    before, why = find_reference(model, None, vocab_size)
    if details and before is None:
        say(f"{model} is an edited model, but it is audited alone: {why}")
    return Subject(model, before, why if details else "", [layer["name"] for layer in details.get("layers", [])])


@dataclass(frozen=True)
class Found:
    """What one model makes of it all.

    Attributes:
        texts: Of the passages of the texts.
        log_p: Logarithms of the probabilities of all passages, by set.
        curve: Expected share extracted over the number of samples.
        record: Figures of the evaluation, with intervals and differences.
    """

    texts: Extractable
    log_p: Mapping[str, Tensor]
    curve: list[float]
    record: dict[str, Any]


def measured(
    options: Namespace, sampling: Sampling, subject: Subject, folder: Path, sets: Mapping[str, Passages]
) -> dict[str, Found]:
    """Every stage, by the validation loop; what an interrupted audit has measured is not measured again.

    Args:
        sampling: How samples are drawn.
        folder: Of the audit, which keeps what it goes on from in its state.
        sets: Passages by name; those of the texts are ``TEXTS``.
    """
    files: dict[str, Any] = {name: str(_written(folder / STATE / f"{name}.jsonl", sets[name])) for name in sets}
    others = files.pop(NONMEMBERS, None)
    data = TextData(
        memorized=files[TEXTS],
        sets={name: file for name, file in files.items() if name != TEXTS},
        members=None if others is None else files[TEXTS],
        nonmembers=others,
        heldout=options.heldout,
        heldout_tokens=options.heldout_tokens,
        eval_batch_size=options.batch_size,
        seq_len=SEQ_LEN,
        own_tokenizer=options.data.own_tokenizer,
    )
    measures = Measures(extraction=sampling)
    evaluator = ModelEvaluator(subject.model, options.dtype, data, folder, options.accelerator, measures)
    module = evaluator.module
    module.evaluation_folder = folder / STATE
    module.edited_layers = subject.edited
    texts = torch.tensor([passage.text for passage in sets[TEXTS].passages])
    say(f"{sets[TEXTS].source}: {sets[TEXTS].told()}")
    found = {}
    for name, source in subject.stages.items():
        say(f"measure {source}" + (f" ({name} the edit)" if subject.before else ""))
        module.turn_to("edited" if name == "after" else "baseline", source)
        record = evaluator(open_model(source, options))
        figures = module.latest.figures
        log_p = {of: figures[f"{prefix(of)}extraction.median_log10_p"].sums * math.log(10) for of in files}
        near = figures["near_verbatim@1"].sums.log() if sampling.near_verbatim else None
        made = Extractable(texts, log_p[TEXTS], figures["strict_acc"].sums.bool(), near)
        found[name] = Found(made, log_p, module.latest.curves[TEXTS], record)
    return found


def prefix(name: str) -> str:
    """What stands before the names of a set's figures."""
    return "" if name == TEXTS else f"{name}/"


def _written(path: Path, texts: Passages) -> Path:
    """Passages as a memorized set."""
    path.parent.mkdir(exist_ok=True)
    with new_file(path) as partial:
        rows = [json.dumps({"prefix_ids": p.prefix, "suffix_ids": p.suffix}) + "\n" for p in texts.passages]
        partial.write_text("".join(rows), "utf-8")
    return path


def described(
    options: Namespace, sampling: Sampling, subject: Subject, sets: Mapping[str, Passages], found: Mapping[str, Found]
) -> dict[str, Any]:
    """What ``audit.json`` holds."""
    texts = sets[TEXTS]
    figures = {name: one.texts.figures(options.chance) for name, one in found.items()}
    shown = {name: {key: _interval(figure) for key, figure in each.items()} for name, each in figures.items()}
    changes: dict[str, Any] = {}
    if subject.before is not None:
        before, after = figures.values()
        changes = {key: _numbers(paired_difference(before[key], after[key])) for key in after}
    own = [*(GENERAL if subject.before is not None else GENERAL[:1]), "prior_ratio_log10"]
    for name, one in found.items():
        for key in own:
            if one.record.get(key) is not None:
                shown[name][key] = _numbers([one.record[key], *one.record["intervals"].get(key, [None, None])])
            if key in one.record["differences"]:
                changes[key] = _numbers(one.record["differences"][key])
    value = list(shown.values())[-1][options.measure]["value"]
    audit: dict[str, Any] = {
        "verdict": [],
        "measure": options.measure,
        "value": value,
        "fail_above": options.fail_above,
        "exceeded": options.fail_above is not None and value > options.fail_above,
        "model": str(subject.model),
        "before": None if subject.before is None else str(subject.before),
        "texts": {
            "source": texts.source,
            "n_texts": len(texts.sizes),
            "n_passages": len(texts.passages),
            "halved": texts.halved,
            "left_out": texts.too_short,
            "told": texts.told(),
            "prefix_len": options.prefix_len or (None if texts.untouched else PREFIX),
            "suffix_len": options.suffix_len or (None if texts.untouched else SUFFIX),
        },
        "heldout": None if options.heldout is None else Corpus.parse(options.heldout, "heldout").label,
        "sampling": asdict(sampling),
        "chance": options.chance,
        "counts": _counts({name: one.texts for name, one in found.items()}, options.chance),
        "figures": shown,
        "changes": changes,
        "curve": {"tries": list(CURVE), "expected": {name: one.curve for name, one in found.items()}},
        "leaks": _leaks(found, sets),
        "near_ties": sum(int(one.record["n_near_ties"]) for one in found.values()),
        "command": command_line(*sys.argv[1:]),
        "timestamp": timestamp(),
        "version": version("lightning-kfac"),
    }
    audit["not_measured"] = not_measured(audit, subject.why)
    audit["verdict"] = verdict(audit)
    return audit


def _leaks(found: Mapping[str, Found], sets: Mapping[str, Passages]) -> dict[str, Any] | None:
    """How well membership tests tell the texts from others, test by test; None where there were no others.

    Passages of one text say nothing of other texts, so their AUCs have no interval.
    """
    records = {stage: one.record for stage, one in found.items()}
    tests = measured_leaks(records.values())
    if not tests:
        return None
    last = list(records.values())[-1]
    apart = all(len(sets[name].passages) == len(sets[name].sizes) for name in (TEXTS, NONMEMBERS))
    figures = {}
    for name in tests:
        keys = {"auc": f"{OBJECT}.{name}.auc", "tpr": f"{OBJECT}.{name}.{TPR}"}
        figures[name] = {of: _of_stages(records, key, apart) for of, key in keys.items()}
    counts = {of: last[f"{OBJECT}.{of}"] for of in ("members", "nonmembers")}
    return {**counts, "apart": apart, "tests": figures}


def _of_stages(records: Mapping[str, Mapping[str, Any]], key: str, bounded: bool) -> dict[str, Any]:
    """A figure in every stage, and its change, where there is one; with intervals only if they are wanted."""
    nothing = [None, None]
    rows = {stage: [row.get(key), *(row["intervals"].get(key) or nothing)] for stage, row in records.items()}
    if change := list(records.values())[-1]["differences"].get(key):
        rows["change"] = change
    return {of: _numbers(row if bounded else [row[0], *nothing]) for of, row in rows.items()}


def _interval(figure: Figure) -> dict[str, float | None]:
    return _numbers([figure.value, *interval(figure)])


def _numbers(values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), map(finite, values), strict=True))


def _counts(made: Mapping[str, Extractable], chance: float) -> dict[str, dict[str, int]]:
    """Whole numbers behind the shares; of the last stage also which came out in no stage before."""
    counts = {}
    earlier = torch.zeros(0, dtype=torch.bool)
    for name, one in made.items():
        each: dict[str, int] = {"strict": int(one.strict.sum())}
        for n in COUNTED:
            out = one.comes_out(n, chance)
            each |= {f"passages@{n}": int(out.sum()), f"texts@{n}": int(one.texts(out).sum())}
        out = one.comes_out(COUNTED[-1], chance)
        each["new"] = int((out & ~earlier).sum()) if len(earlier) else 0
        earlier = out
        counts[name] = each
    return counts


def strips_along(name: str, texts: Passages, found: Mapping[str, Found]) -> list[Strip]:
    """Those of the texts that are longer than a passage, of which most comes out.

    Args:
        name: Of the set that the texts are.
    """
    several = np.bincount([passage.text for passage in texts.passages], minlength=len(texts.sizes)) > 1
    whole = [number for number, passage in enumerate(texts.passages) if several[passage.text]]
    if not whole:
        return []
    rows = [texts.passages[number] for number in whole]
    place = {"document": np.array([row.text for row in rows]), "start": np.array([row.start for row in rows])}
    windows = {stage: place | {"log_p": one.log_p[name][whole].numpy()} for stage, one in found.items()}
    chosen = most_extracted(([columns] for columns in windows.values()), len(texts.sizes))
    drawn = {n: (f"{texts.source}: {n + 1}", texts.sizes[n]) for n in chosen if several[n]}
    stages = {stage if len(found) > 1 else "": partial(iter, [columns]) for stage, columns in windows.items()}
    return strips_of(drawn, stages, len(rows[0].prefix), len(rows[0].suffix))


def excerpts_of(
    texts: Passages, found: Mapping[str, Found], chance: float, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """As text, the passages that come out of the last stage, then those that are likeliest in any."""
    last = list(found.values())[-1].texts
    best = torch.stack([one.texts.log_p for one in found.values()]).amax(0)
    order = torch.where(last.comes_out(COUNTED[-1], chance), last.log_p + 1e6, best)
    chosen = order.argsort(descending=True, stable=True)[:EXCERPTS].tolist()
    return [_excerpt(texts.passages[n], n, found, tokenizer) for n in chosen if math.isfinite(best[n])]


def _excerpt(
    passage: Passage, number: int, found: Mapping[str, Found], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    return {
        "name": f"Text {passage.text + 1}" + (f", token {passage.start:,}" if passage.start else ""),
        "prefix": str(tokenizer.decode(passage.prefix))[-SHOWN_OF_PREFIX:],
        "suffix": str(tokenizer.decode(passage.suffix)),
        "log10_p": {name: finite(one.texts.log_p[number] / math.log(10)) for name, one in found.items()},
    }


def finite(value: Tensor | float | None) -> float | None:
    """As JSON has it: what is infinite, or not known, is null."""
    return None if value is None or not math.isfinite(value) else float(value)
