"""EleutherAI's lm-evaluation-harness: what it wrote of each document, and a run of it where it is installed.

With ``--log_samples`` the harness writes ``samples_TASK_DATE.jsonl``, in a folder of the model's name: one row a
document and filter, with ``doc_id``, ``doc_hash``, ``arguments``, ``filter``, ``metrics``, and each metric by its name.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_kfac.data.records import records_of
from lightning_kfac.errors import InputError, first_line
from lightning_kfac.evaluation.abilities import Answers
from lightning_kfac.models.loading import Dtype
from lightning_kfac.models.source import ModelSource

SOURCE = "lm-eval"
LOG = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl(\.gz|\.zst)?")
# Which metric counts where nobody says it; the first that the rows have.
METRICS = ("exact_match", "acc", "em", "f1", "contains")
# By how the name of a task begins, the longest that fits. What arXiv 2510.24256 groups so, and tasks like them.
KNOWN_GROUPS = {
    "bbh": "logic",
    "leaderboard_bbh": "logic",
    "logiqa": "logic",
    "boolq": "open-book",
    "openbookqa": "open-book",
    "commonsense_qa": "open-book",
    "winogrande": "open-book",
    "squad": "open-book",
    "triviaqa": "closed-book",
    "popqa": "closed-book",
    "nq_open": "closed-book",
    "webqs": "closed-book",
    "gsm8k": "arithmetic",
    "arithmetic": "arithmetic",
    "asdiv": "arithmetic",
    "mmlu_pro_math": "arithmetic",
    "leaderboard_math": "arithmetic",
    "minerva_math": "arithmetic",
}


@dataclass(frozen=True)
class Reading:
    """How logs are read.

    Attributes:
        groups: Group by task; of others the known one, or ``other``.
        metrics: Metric by task, as the harness names it, also with a filter: ``exact_match,strict-match``. By default
            the first of ``METRICS`` that the rows have, under the first filter.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)

    def group_of(self, task: str) -> str:
        """The group of a task.

        Example:
            >>> Reading({"mine": "logic"}).group_of("mine"), Reading().group_of("bbh_cot_fewshot_navigate")
            ('logic', 'logic')
        """
        known = max((name for name in KNOWN_GROUPS if task.startswith(name)), key=len, default=None)
        return self.groups.get(task) or (KNOWN_GROUPS[known] if known else "other")


@dataclass(frozen=True)
class Log:
    """The log of one task.

    Attributes:
        answers: Scores by document: its number with the hash of its contents.
        prompts: What the model was given of each document.
    """

    answers: Answers
    prompts: list[str]


def read_logs(folder: Path, reading: Reading) -> list[Log]:
    """The newest log of each task in a folder, at any depth.

    Raises:
        InputError: There is none, or one cannot be used; names the file and the line.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that lm_eval wrote with --log_samples")
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.rglob("samples_*.jsonl*")):
        if (found := LOG.fullmatch(path.name)) is not None:
            newest[found["task"]] = max(newest.get(found["task"], ("", path)), (found["date"], path))
    if not newest:
        raise InputError(f"{folder}: holds no samples_TASK_DATE.jsonl; run lm_eval with --log_samples")
    return [_read(path, task, reading) for task, (_, path) in newest.items()]


def _read(path: Path, task: str, reading: Reading) -> Log:
    scores: dict[str, float] = {}
    prompts: list[str] = []
    metric, _, wanted = reading.metrics.get(task, "").partition(",")
    for line, row in records_of(path):
        where = f"{path}, line {line}"
        wanted = wanted or str(row.get("filter", "none"))
        metric = metric or _metric_of(row, where)
        if str(row.get("filter", "none")) != wanted:
            continue
        name = f"{row.get('doc_id')} {str(row.get('doc_hash', ''))[:16]}".strip()
        if "doc_id" not in row or name in scores:
            raise InputError(f"{where}: {'a document twice' if name in scores else 'no doc_id'}; not a log of lm_eval")
        scores[name] = _score(row, metric, where)
        prompts += _prompt(row.get("arguments"))
    if not scores:
        raise InputError(f"{path}: no row has the filter {wanted!r}")
    label = metric if wanted == "none" else f"{metric},{wanted}"
    return Log(Answers(task, reading.group_of(task), label, scores, source=SOURCE), prompts)


def _metric_of(row: Mapping[str, Any], where: str) -> str:
    known = [name for name in METRICS if name in row]
    if not known:
        metrics = ", ".join(map(str, row.get("metrics", []))) or "none"
        raise InputError(f"{where}: none of {', '.join(METRICS)}; it has the metrics {metrics}: name one in --metrics")
    return known[0]


def _score(row: Mapping[str, Any], metric: str, where: str) -> float:
    score = row.get(metric)
    if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
        raise InputError(f"{where}: {metric} is {score!r}; a score lies in [0, 1]")
    return float(score)


def _prompt(arguments: Any) -> list[str]:
    """The first text that the model was given: of a file ``{gen_args_0: {arg_0: ...}}``, in older ones lists."""
    first = arguments.get("gen_args_0") if isinstance(arguments, dict) else next(iter(arguments or []), None)
    text = first.get("arg_0") if isinstance(first, dict) else next(iter(first or []), None)
    return [text] if isinstance(text, str) and text else []


def check_tasks(tasks: Iterable[str], include: Path | None) -> None:
    """Raises ``InputError`` where the harness is not installed, or does not know a task.

    Args:
        include: Folder of task files beside its own.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks need lm-evaluation-harness: pip install 'lightning-kfac[harness]'")
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=_text(include)).all_tasks
    if unknown := sorted(set(tasks) - set(known)):
        raise InputError(f"--tasks: lm_eval knows no task {unknown[0]}; --include names a folder with more")


def run_harness(
    model: ModelSource,
    dtype: Dtype,
    tasks: Sequence[str],
    folder: Path,
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> None:
    """Has the harness evaluate a checkpoint, on the accelerator if there is one, and write its logs.

    Args:
        model: A folder or a hub model, as transformers loads it.
        dtype: Of its weights.
        tasks: As the harness names them, see ``check_tasks``.
        folder: For results and logs.
        include: Folder of task files beside its own.
        limit: Documents a task.

    Raises:
        InputError: It cannot load the model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    local = model.path
    arguments = {"pretrained": str(local if local.is_dir() else model.name), "dtype": dtype, "revision": model.revision}
    tracker = EvaluationTracker(output_path=str(folder))
    try:
        results = simple_evaluate(
            model="hf",
            model_args={name: value for name, value in arguments.items() if value is not None},
            tasks=list(tasks),
            task_manager=TaskManager(include_path=_text(include)),
            limit=limit,
            batch_size=batch_size,
            device=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
            log_samples=True,
            evaluation_tracker=tracker,
            bootstrap_iters=0,
        )
    except OSError as error:
        raise InputError(f"lm_eval cannot evaluate {model}: {first_line(error)}") from error
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)  # first: the logs take their date from it
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
