"""What several runs of many commands share: steps that are done once, and the weakest edit that suppresses enough."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_kfac import load_factors
from lightning_kfac.cli.edit import main as edit
from lightning_kfac.cli.shipped import find_config
from lightning_kfac.cli.train import main as train
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.loading import load_model
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.results import append_result, read_results
from lightning_kfac.storage.run_folder import STATUS, RunFolder

TARGET = 0.1
FIGURES = ("strict_acc", "loose_acc", "avg_levenshtein_norm", "extraction.expected_at.1000")
# Shares of the importance to try, in steps of 0.02, finer near 1 for controls that suppress at once.
GRID = [*(round(0.02 * step, 2) for step in range(5, 50)), 0.99, 0.995, 0.998]


@dataclass(frozen=True)
class Steps:
    """Steps of a long run: each writes what it found to a JSON file, and is not done again.

    Attributes:
        folder: Of the run.
    """

    folder: Path

    def run(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What a step found, from its file or found now; with the seconds that it took, those of an earlier try not."""
        path = self.folder / "steps" / f"{name}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return found
        print(f"--- {name}", flush=True)
        wall = time.monotonic()
        cpu = time.process_time()
        found = dict(work())
        found |= {"wall_s": round(time.monotonic() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found, checksum=False)
        return found


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; values other than text as JSON."""
    found = []
    for name, value in options.items():
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value, default=str)]
    return found


def fit(folder: Path, options: Mapping[str, Any], config: str | None = None) -> list[dict[str, Any]]:
    """Runs ``fit`` in a folder, or finds that it is done; gives its results."""
    if not _finished(folder):
        named = [] if config is None else ["--config", config]
        trains = config in ("plant", "demo_model")
        again = ["--overwrite"] if trains and RunFolder(folder).interrupted else []  # a training begins anew
        train(["fit", *named, *words({**options, "trainer.default_root_dir": str(folder)}), *again])
    return read_results(folder / "results.jsonl")


def _finished(folder: Path) -> bool:
    status = folder / STATUS
    return status.is_file() and json.loads(status.read_text("utf-8")).get("status") == "finished"


def seconds_of(folder: Path) -> float:
    """Wall time from the beginning of a finished run to its end, with the interruptions between."""
    status = json.loads((folder / STATUS).read_text("utf-8"))
    begin, end = (datetime.fromisoformat(status[name].replace("Z", "+00:00")) for name in ("started", "finished"))
    return (end - begin).total_seconds()


def command(name: str, options: Mapping[str, Any]) -> None:
    """Runs a command that goes on where it was stopped."""
    edit([name, *words(options)])


def measured(folder: Path, sets: Sequence[str] = ()) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of the unedited model and of the edits that a sweep or a scan measured.

    Args:
        folder: Of the results.
        sets: Names of further memorized sets.
    """
    rows = read_results(folder / "results.jsonl")
    about = ("formula", "rho", "blocks", "projections", "fraction_kept", "relative_change")
    edits = [row for row in rows if row["edit"] is not None]
    shown = [{"edit": {key: row["edit"][key] for key in about}, **figures_of(row, sets)} for row in edits]
    return figures_of(rows[0], sets), shown


def figures_of(row: Mapping[str, Any], sets: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of results with intervals: of the memorized set, of other sets by name, and of held-out text."""
    names = [prefix + figure for prefix in ("", *(f"{name}/" for name in sets)) for figure in FIGURES]
    found = {name: row[name] for name in (*names, "perplexity", "ndcg@10") if name in row}
    intervals = {name: row["intervals"][name] for name in found if name in row["intervals"]}
    differences = {name: row["differences"][name] for name in found if name in row.get("differences", {})}
    return {"figures": found, "intervals": intervals, "differences": differences}


def strict_accuracy(model: Any, sequences: Sequence[Any], enough: float = 1.0, batch_size: int = 8) -> float:
    """Share of sequences that a model recites; without any continuation, so it is cheap.

    Args:
        model: A language model.
        sequences: Of a memorized set.
        enough: Once it is certain that the share is above this, the rest is not read, and counts as not recited.
        batch_size: Sequences at once.
    """
    recited = 0
    for begin in range(0, len(sequences), batch_size):
        some = sequences[begin : begin + batch_size]
        prefixes = [list(map(int, sequence.prefix)) for sequence in some]
        suffixes = [list(map(int, sequence.suffix)) for sequence in some]
        recited += sum(recital.strict for recital in recite(model, prefixes, suffixes, decode=False))
        if recited > enough * len(sequences):
            break
    return recited / len(sequences)


def weakest(reaches: Callable[[float], bool], grid: Sequence[float] = GRID) -> float | None:
    """The largest number of an ascending grid that suppresses, by bisection; None where the least does not.

    Between two neighbours of the grid, one of which suppresses and the other does not; where forgetting does not
    fall with rho there may be a larger one.

    Example:
        >>> weakest(lambda rho: rho <= 0.8, [0.6, 0.7, 0.8, 0.9])
        0.8
    """
    low = -1
    high = len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(grid[middle]):
            low = middle
        else:
            high = middle
    return None if low < 0 else grid[low]


def weakest_edits(
    model_name: str,
    factors: Path,
    sequences: Path,
    results: Path,
    formulas: Sequence[str] = tuple(FORMULAS),
    dtype: str = "float32",
    grid: Sequence[float] = GRID,
    blocks: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """Of each formula the weakest edit that brings strict accuracy on some sequences to the target.

    Args:
        model_name: A folder.
        factors: Of its layers.
        sequences: That choose; a memorized set.
        results: JSON lines of what was tried, from which it goes on; a share above the target is a lower bound.
        formulas: To try.
        grid: Of rho.
        blocks: Only these of the factors.
    """
    model = load_model(model_name, dtype)
    vocabulary = model.config.get_text_config().vocab_size
    choosing = load_memorized(str(sequences), None, vocabulary)
    known = {(row["formula"], row["rho"]): row["strict_acc"] for row in read_results(results)}
    config = EditConfig(blocks="all" if blocks is None else list(blocks))
    editor = KFACEditor(model, load_factors(factors), config, repeated=True)

    def reaches(formula: str, rho: float) -> bool:
        if (formula, rho) not in known:
            report = editor.apply(EditConfig(formula=formula, rho=rho, blocks=config.blocks))
            known[formula, rho] = strict_accuracy(model, choosing, TARGET)
            editor.restore()
            row = {"formula": formula, "rho": rho, "strict_acc": known[formula, rho]}
            append_result(results, row | {"fraction_kept": report.fraction_kept})
            print(row, flush=True)
        return known[formula, rho] <= TARGET

    return {formula: weakest(lambda rho, name=formula: reaches(name, rho), grid) for formula in formulas}


def hash_of(config: str) -> str:
    """SHA-256 of a shipped config."""
    return hashlib.sha256(Path(find_config(config)).read_bytes()).hexdigest()
