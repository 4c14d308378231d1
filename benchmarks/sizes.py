"""What suppression costs as models grow: the recipe of the demo model at three sizes that differ in width alone.

    OMP_NUM_THREADS=1 python -m benchmarks.sizes                  # the three smaller ones: an hour
    OMP_NUM_THREADS=1 python -m benchmarks.sizes --sizes 512      # about 26 M parameters: hours of one core

Each is trained as configs/demo_model.yaml says (the smallest is the demo model itself), on the same text and the same
200 passages; curvature of blocks 3 and 4
is collected as configs/quickstart.yaml says. Of each formula the weakest edit (steps of 0.02) that brings strict
accuracy on the 100 passages that choose to 0.10 is measured on the other 100 and on held-out text. What is done is not
done again. Adds to benchmarks/results/sizes.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.steps import TARGET, Steps, command, fit, hash_of, measured, strict_accuracy, weakest_edits
from lightning_kfac.assets import DEMO
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.loading import load_model
from lightning_kfac.storage.results import read_results

RESULT = Path(__file__).parent / "results" / "sizes.json"
WIDTHS = (128, 256, 384, 512)
FORMULAS = ("original", "modified", "random")
SETS = ("planted_tuning", "planted_report", "unseen")


def trained(folder: Path, width: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's architecture and training at another width, or the demo itself; what it recites."""
    where = DEMO
    if width != WIDTHS[0]:
        size = {
            "model.architecture.hidden_size": width,
            "model.architecture.intermediate_size": 4 * width,
            "model.architecture.num_attention_heads": width // 32,
        }
        fit(folder, {**size, **options}, config="demo_model")
        where = folder / "model"
    model = load_model(str(where), "float32")
    sets = {name: load_memorized(str(DEMO / f"{name}.jsonl"), None, model.config.vocab_size) for name in SETS}
    recited = {name: strict_accuracy(model, sequences) for name, sequences in sets.items()}
    parameters = sum(p.numel() for p in model.parameters())
    return {"width": width, "model": str(where), "parameters": parameters, "recited": recited}


def suppressed(folder: Path, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of each formula the weakest edit that suppresses, measured."""
    named = {"model.model_name": model, "edit": None}
    fit(folder / "collected", {**named, **options}, config="quickstart")
    factors = folder / "collected" / "factors"
    chosen_by = str(DEMO / "planted_tuning.jsonl")
    rhos = weakest_edits(model, factors, Path(chosen_by), folder / "thresholds.jsonl", FORMULAS)
    compared = {
        "factors": str(factors),
        "output": str(folder / "compare"),
        "dtype": "float32",
        "formulas": [name for name, rho in rhos.items() if rho is not None],
        "rhos": {name: [rho] for name, rho in rhos.items() if rho is not None},
        "seeds": [0],
        "target": TARGET,
        "data.memorized": chosen_by,
        "data.sets.report": str(DEMO / "planted_report.jsonl"),
        "data.heldout": "embedded",
        "data.heldout_tokens": 35000,
        "data.seq_len": 128,
        "data.batch_size": 16,
    }
    command("sweep", compared | {name: value for name, value in options.items() if name == "data.heldout_tokens"})
    baseline, edits = measured(folder / "compare", ["report"])
    return {"rhos": rhos, "least": least_recited(folder / "thresholds.jsonl"), "baseline": baseline, "edits": edits}


def least_recited(tried: Path) -> dict[str, float]:
    """Of each formula the lowest strict accuracy among the edits that were tried."""
    least: dict[str, float] = {}
    for row in read_results(tried):
        least[row["formula"]] = min(row["strict_acc"], least.get(row["formula"], 1.0))
    return least


def measure(folder: Path, width: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One size.

    Args:
        folder: Of the run.
        width: Hidden size.
        options: Of ``fit``, beside those of the configs.
    """
    steps = Steps(folder)
    some = options or {}
    model = steps.run("train", lambda: trained(folder / "trained", width, some))
    of_text = {name: value for name, value in some.items() if name in ("data.max_tokens", "data.heldout_tokens")}
    found = steps.run("suppress", lambda: suppressed(folder, model["model"], of_text))
    return {"train": {name: value for name, value in model.items() if name != "model"}, "suppress": found}


def main() -> None:
    """Measures what is missing and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(WIDTHS[:3]), choices=WIDTHS, help="Widths.")
    parser.add_argument("--folder", type=Path, default=Path("runs/sizes"))
    arguments = parser.parse_args()
    known = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {"sizes": {}}
    for width in arguments.sizes:
        known["sizes"][str(width)] = measure(arguments.folder / str(width), width) | {"machine": machine()}
        known["configs"] = {name: hash_of(name) for name in ("demo_model", "quickstart")}
        RESULT.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{width} -> {RESULT}")


if __name__ == "__main__":
    main()
