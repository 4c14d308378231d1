"""Small runs of every kind, written as the commands write them, for tests of their pages."""

import json

import numpy as np
from PIL import Image

from lightning_kfac.metrics.extraction import CURVE
from lightning_kfac.storage.results import append_result

BEFORE = {
    "strict_acc": 0.98, "loose_acc": 1.0, "avg_levenshtein_norm": 0.01, "n_sequences": 50, "perplexity": 20.0,
    "ndcg@10": 1.0, "extraction.expected_at.10": 0.9, "extraction.expected_at.1000": 0.995,
    "extraction.temperature": 1.0, "extraction.top_k": None, "extraction.top_p": 1.0, "model": "a/base",
    "intervals": {"strict_acc": [0.9, 0.99], "perplexity": [18.5, 22.1]},
}  # fmt: skip
AFTER = BEFORE | {
    "strict_acc": 0.02, "loose_acc": 0.06, "avg_levenshtein_norm": 0.71, "perplexity": 21.0, "ndcg@10": 0.94,
    "extraction.expected_at.10": 0.001, "extraction.expected_at.1000": 0.026,
    "intervals": {"strict_acc": [0.004, 0.105], "perplexity": [19.2, 23.3], "ndcg@10": [0.93, 0.95]},
    "differences": {"strict_acc": [-0.96, -1.0, -0.9], "perplexity": [1.0, 0.8, 1.2], "ndcg@10": [-0.06, -0.07, -0.05]},
}  # fmt: skip
EDIT = {
    "formula": "original", "rho": 0.8, "mode": "suppress", "alpha": None, "layers": None, "seed": None, "mix": None,
    "basis": None, "blocks": [3], "projections": ["up"], "fraction_kept": 0.2, "mass_kept": 0.8, "relative_change": 0.5,
}  # fmt: skip
LONG = "a text that goes on " * 12 + "and_one_word_" * 30


def write_comparison(folder):
    append_result(folder / "results.jsonl", {"stage": "baseline", **BEFORE})
    append_result(folder / "results.jsonl", {"stage": "edited", **AFTER, "edit": EDIT, "model": "runs/" + "deep/" * 30})
    example = {"prefix": LONG, "gold": LONG, "before": LONG, "after": "one three", "diverging": "three"}
    counts = {"examples": [example], "edges": [-1, 0, 1], "loss_change": [5, 9]}
    (folder / "comparison.json").write_text(json.dumps(counts))
    curve = np.linspace(0, 1, len(CURVE)).tolist()
    curves = {"memorized": {"baseline": curve, "edited": [0.1 * share for share in curve]}}
    (folder / "extraction.json").write_text(json.dumps({"tries": CURVE, "curves": curves}))
    (folder / "config.yaml").write_text(f"model: {LONG}\n")
    (folder / "run.json").write_text(json.dumps({"command": f"python train.py fit --data.corpus '{LONG}'"}))


def edits(folder, places):
    append_result(folder / "results.jsonl", {"stage": "baseline", "point": "a", "edit": None, **BEFORE})
    for number, (blocks, projections, rho) in enumerate(places):
        figures = AFTER | {"strict_acc": 0.05 * (number % 5), "perplexity": 20.5 + number}
        example = {"prefix": "given", "gold": "the true one", "after": f"continuation <{number}> {LONG}"}
        row = {**figures, "edit": EDIT | {"blocks": blocks, "projections": projections, "rho": rho}, "example": example}
        append_result(folder / "results.jsonl", {"stage": "edited", "point": f"b{number}", **row})
    (folder / "config.yaml").write_text("factors: runs/f <actors>\ntarget: 0.1\n")


def write_sweep(folder):
    edits(folder, [([3, 4], ["gate", "up"], round(0.5 + 0.1 * number, 1)) for number in range(5)])


def write_scan(folder):
    alone = [([block], [name], 0.6) for block in (3, 4) for name in ("gate", "up")]
    edits(folder, [*alone, *(([block], ["gate", "up"], 0.6) for block in (3, 4)), ([3, 4], ["gate", "up"], 0.9)])
    found = {"blocks": [3, 4], "projections": ["gate", "up"], "rho": 0.9, "target": 0.1}
    found |= {"choosing": AFTER | {"edit": EDIT}, "reporting": [BEFORE, AFTER]}
    (folder / "recommended.json").write_text(json.dumps(found))


def write_attacks(folder):
    for stage, row in (("baseline", BEFORE), ("edited", AFTER)):
        append_result(folder / "results.jsonl", {"stage": stage, "point": stage, **row})
    for steps in (1, 5, 20):
        share = 0.01 * steps
        about = {"attack": {"name": "relearning", "steps": steps}, "label": "relearning one half, lr 0.0001"}
        about |= {"got": [share, share / 2, 2 * share], "recovered": {"strict_acc": [share, 0.0, 2 * share]}}
        append_result(folder / "results.jsonl", {"stage": "attacked", "point": f"a{steps}", **AFTER, **about})


def write_search(folder):
    about = {"windows": 1234, "checked": 300, "recited": 7, "kept": 7, "corpus": LONG, "before": None}
    (folder / "mining.json").write_text(json.dumps(about))
    rows = [{"document": n, "offset": n, "prefix": LONG, "suffix": "recited"} for n in range(7)]
    (folder / "memorized.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (1000, 300), "white").save(folder / "windows.png")


def write_abilities(folder):
    tasks = [ability(name, kept, name == "poems") for name, kept in (("sums", 0.5), ("facts", 0.9), ("poems", 1.2))]
    groups = [ability(task["name"], 1.0, False) for task in tasks]
    found = {"tasks": tasks, "groups": groups, "low_shares": {}, "correlation": None, "model": "runs/edited"}
    (folder / "abilities.json").write_text(json.dumps(found))


def ability(name, kept, at_chance):
    about = {"name": name, "group": name, "metric": "choice", "source": "built-in", "n": 1319, "chance": 0.25}
    figures = {"unedited": [0.9, 0.85, 0.95], "edited": [0.9 * kept, None, None], "at_chance": at_chance, "p": 0.01}
    return {**about, **figures, "retention": [kept, kept - 0.05, kept + 0.05], "lost": 3, "gained": 1}


def estimate(value):
    return {"value": value, "low": max(0.0, value - 0.05), "high": value + 0.05}


def audit():
    """What ``audit.json`` says of an edited model, and excerpts."""
    names = ("texts@10", "texts@1000", "passages@10", "passages@1000", "strict", "expected@1", "expected@10")
    names += ("expected@1000", "perplexity", "ndcg@10")
    figures = {stage: {name: estimate(0.3) for name in names} for stage in ("before", "after")}
    test = {"auc": {stage: estimate(0.8) for stage in ("before", "after", "change")}}
    test |= {"tpr": {stage: estimate(0.2) for stage in ("before", "after")}}
    count = {"strict": 3, "passages@10": 2, "texts@10": 2, "passages@1000": 5, "texts@1000": 4, "new": 1}
    return {
        "model": "runs/" + "deep/" * 30,
        "before": "a/base",
        "texts": {"source": "texts.jsonl", "n_texts": 10, "n_passages": 40, "told": "10 texts", "left_out": 1,
                  "prefix_len": 64, "suffix_len": 48},
        "heldout": "embedded",
        "sampling": {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "near_verbatim": 0},
        "chance": 0.5,
        "counts": {"before": count, "after": count},
        "figures": figures,
        "changes": {name: estimate(0.1) for name in names},
        "curve": {"tries": CURVE, "expected": {"before": [0.9] * len(CURVE), "after": [0.2] * len(CURVE)}},
        "leaks": {"tests": {"loss": test, "zlib": test}, "members": 10, "nonmembers": 12, "apart": True},
        "excerpts": [{"name": "one", "log10_p": {"before": -0.1, "after": None}, "prefix": LONG, "suffix": "recited"}],
        "not_measured": ["Paraphrases, and translations."],
        "command": f"lightning-kfac audit --texts '{LONG}'",
    }  # fmt: skip
