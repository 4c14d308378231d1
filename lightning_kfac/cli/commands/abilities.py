"""Show what an edit leaves of each ability: the same questions to the unedited and the edited model, task by task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.next_steps import show_page
from lightning_kfac.cli.options import add_model_options, check_not_within, named_model, open_model, output_folder
from lightning_kfac.console import console, say, show, track_count, visible
from lightning_kfac.data.ability_tasks import AbilityTask, local_tasks, recitation_task
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.text_ids import text_ids
from lightning_kfac.editing.edited_model import find_reference
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.abilities import (
    Answers,
    Kept,
    ModelReader,
    answer,
    check_factors,
    check_lengths,
    compare,
    loss_and_share,
    low_shares,
    task_texts,
)
from lightning_kfac.evaluation.harness import Log, Reading, check_tasks, read_logs, run_harness
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.models.language import most_positions, vocabulary_size
from lightning_kfac.models.loading import load_config, load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.reporting.abilities import abilities_table, correlation_line
from lightning_kfac.reporting.figures.abilities import abilities_figure
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.run_folder import EVENTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTED = True
RESULT = "abilities.json"
FIGURES = RESULT
ANSWERS = "answers.jsonl"
FIGURE = "abilities.png"
HARNESS = "harness"
LEAST_QUESTIONS = 4
STAGES = ("unedited", "edited")
Both = dict[str, list[Answers]]


class Pair(NamedTuple):
    """The two models."""

    unedited: ModelSource
    edited: ModelSource


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, otherwise="The edited one, whose edit.json names the unedited one.")
    parser.add_argument("--unedited", type=str, help="The model before the edit; by default the one in edit.json.")
    corpus = "Text to ask about: embedded, a file or folder, a hub data set. Best what the model was trained on."
    parser.add_argument("--corpus", type=str | dict[str, Any], default="embedded", help=corpus)
    parser.add_argument("--memorized", type=str, help="What the unedited model recites: a memorized set.")
    parser.add_argument("--questions", type=int, default=120, help="Questions a task; 0 leaves the built-in ones out.")
    parser.add_argument("--seed", type=int, default=0, help="Decides which questions are asked.")
    factors = "Factor folder of the unedited model: is more lost where more activation energy is in low bands?"
    parser.add_argument("--factors", type=str, help=factors)
    logs = "Folder of sample logs that lm_eval wrote of the {} model (--log_samples)."
    parser.add_argument("--logs.unedited", type=str | None, default=None, help=logs.format("unedited"))
    parser.add_argument("--logs.edited", type=str | None, default=None, help=logs.format("edited"))
    tasks = "Tasks of lm-evaluation-harness to run on both models, where it is installed."
    parser.add_argument("--tasks", type=list[str], default=[], help=tasks)
    parser.add_argument("--include", type=str | None, help="Folder with more task files for the harness.")
    parser.add_argument("--limit", type=int | None, help="Documents a task of the harness; by default all.")
    groups = "--groups.TASK GROUP, of tasks of the harness: logic, open-book, ... or a name of your own."
    parser.add_argument("--groups", type=dict[str, str], default={}, help=groups)
    metrics = "--metrics.TASK METRIC, of tasks of the harness, also with a filter: exact_match,strict-match."
    parser.add_argument("--metrics", type=dict[str, str], default={}, help=metrics)
    differing = "Where transformers ignores tokenizer.json: use the file's own tokenizer (true) or the other (false)."
    parser.add_argument("--data.own_tokenizer", type=bool | None, default=None, help=differing)
    parser.add_argument("--output", type=str, default="runs/abilities", help="Folder of figures, answers, TensorBoard.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")


def run(options: Namespace) -> None:
    """Asks both models, compares and shows."""
    _check(options)
    models = None
    if options.model:
        edited = named_model(options, {}, "")
        models = Pair(_unedited(options, edited), edited)
    inputs = {"the factors": options.factors, **{f"the {which} model": model for which, model in _named(models)}}
    check_not_within(Path(options.output), inputs | {f"{k} logs": v for k, v in options.logs.items()})
    logs = _logs(options, options.logs)
    with output_folder(options, "abilities") as output, new_folder(output.new) as partial:
        found, answers = _measured(options, models, logs, partial)
        _write(partial, found, answers)
    show(abilities_table(found))
    if said := correlation_line(found):
        console.print(said)
    console.print(f"{RESULT}, {ANSWERS}, {FIGURE} and tensorboard/ are in {output.path}/")
    show_page(output.path)


def _check(options: Namespace) -> None:
    """Raises ``InputError`` for options that cannot be used, before anything is read."""
    logs = options.logs.as_dict()
    if not options.model and not any(logs.values()):
        raise InputError("--model is missing: the edited model, a folder that fit or apply wrote; or give --logs")
    if any(logs.values()) and not all(logs.values()):
        raise InputError("--logs.unedited and --logs.edited belong together: the same tasks of both models")
    if options.questions and options.questions < LEAST_QUESTIONS:
        raise InputError(f"--questions is {options.questions}; it must be at least {LEAST_QUESTIONS}, or 0 for none")
    if options.model and not (options.questions or options.tasks or any(logs.values()) or options.memorized):
        raise InputError("--questions 0 leaves nothing to ask: give --memorized, --tasks or --logs")
    for name in ("tasks", "factors", "memorized"):
        if options[name] and not options.model:
            raise InputError(f"--{name} needs a --model")
    if options.tasks:
        check_tasks(options.tasks, _included(options))
    if options.model and options.questions:
        Corpus.parse(options.corpus).check()


def _unedited(options: Namespace, edited: ModelSource) -> ModelSource:
    """The model before the edit, known before anything is loaded."""
    unedited, why = find_reference(edited, options.unedited, load_config(edited).get_text_config().vocab_size)
    if unedited is None:
        raise InputError(f"{edited}: {why}; name the unedited model with --unedited")
    return unedited


def _named(models: Pair | None) -> list[tuple[str, ModelSource]]:
    return [] if models is None else list(models._asdict().items())


def _logs(options: Namespace, folders: Mapping[str, str | None]) -> dict[str, list[Log]]:
    """Logs of both models; empty where there are none."""
    reading = Reading(options.groups, options.metrics)
    return {which: read_logs(Path(folder), reading) for which, folder in folders.items() if folder}


def _measured(
    options: Namespace, models: Pair | None, logs: Mapping[str, list[Log]], folder: Path
) -> tuple[dict[str, Any], Both]:
    """What is written, and the answers of both models."""
    answers: Both = {which: [log.answers for log in logs.get(which, [])] for which in STAGES}
    shares: dict[str, float] = {}
    about: dict[str, Any] = {"logs": dict(options.logs.items())}
    if models is not None:
        harness = _run_harness(options, models, folder)
        asked, shares, made_by = _ask_both(options, models, [*logs.get("unedited", []), *harness.get("unedited", [])])
        for which in STAGES:
            answers[which] = [*asked[which], *answers[which], *(log.answers for log in harness.get(which, []))]
        about |= models.edited.about() | {"unedited": models.unedited.about()} | made_by
    kept, groups = compare(answers["unedited"], answers["edited"])
    _tell_unpaired(kept, answers)
    correlation = loss_and_share(kept, shares)
    found = {
        **about,
        "tasks": [task.record() for task in kept],
        "groups": [group.record() for group in groups],
        "low_shares": shares,
        "correlation": correlation and correlation.record(),
    }
    return found, answers


def _included(options: Namespace) -> Path | None:
    return None if options.include is None else Path(options.include)


def _run_harness(options: Namespace, models: Pair, folder: Path) -> dict[str, list[Log]]:
    if not options.tasks:
        return {}
    for which, model in _named(models):
        say(f"lm_eval: the {which} model, {', '.join(options.tasks)}")
        place = folder / HARNESS / which
        run_harness(model, options.dtype, options.tasks, place, include=_included(options), limit=options.limit)
    return _logs(options, {which: str(folder / HARNESS / which) for which in STAGES})


def _ask_both(options: Namespace, models: Pair, logs: Sequence[Log]) -> tuple[Both, dict[str, float], dict[str, Any]]:
    """Answers to the built-in tasks, shares of low bands of all tasks, and what the questions are."""
    tokenizer = load_tokenizer(models.edited, own_tokenizer=options.data.own_tokenizer)
    tasks: list[AbilityTask] = []
    model = open_model(models.unedited, options)
    corpus = Corpus.parse(options.corpus)
    if options.questions:
        tasks += local_tasks(corpus.documents(), tokenizer, options.questions, options.seed)
    if options.memorized:
        tasks.append(recitation_task(load_memorized(options.memorized, tokenizer, vocabulary_size(model))))
    check_lengths(tasks, model)
    most = most_positions(load_config(models.unedited).get_text_config())
    texts = task_texts(tasks)
    for log in logs:
        texts[log.answers.task] = [text_ids(tokenizer, prompt)[-(most or 0) :] for prompt in log.prompts]
    shares = _low_shares(options, model, texts)
    before = _ask(tasks, model, tokenizer, "unedited")
    after = _ask(tasks, open_model(models.edited, options), tokenizer, "edited")
    about = {
        "corpus": corpus.label,
        "memorized": options.memorized,
        "questions": options.questions,
        "seed": options.seed,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    return {"unedited": before, "edited": after}, shares, about


def _low_shares(options: Namespace, model: nn.Module, texts: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, float]:
    if not options.factors:
        return {}
    factors = load_factors(options.factors)
    check_factors(model, factors)
    texts = {task: texts_of_task for task, texts_of_task in texts.items() if texts_of_task}
    with track_count("low bands", "tasks", total=len(texts)) as advance_to:
        shares = low_shares(model, factors, BasisCache.beside(factors), texts)
        advance_to(len(texts))
    return shares


def _tell_unpaired(kept: Sequence[Kept], answers: Both) -> None:
    """Says where one model answered documents that the other did not."""
    counts = {which: {one.task: len(one.scores) for one in some} for which, some in answers.items()}
    for task in kept:
        both = [counts[which][task.name] for which in STAGES]
        if set(both) != {task.n}:
            say(f"{task.name}: {task.n} documents that both models answered, of {both[0]} and {both[1]}")
    alone = [name for which, other in (STAGES, STAGES[::-1]) for name in counts[which] if name not in counts[other]]
    if alone:
        say(f"answered by one model only, and left out: {', '.join(alone)}")


def _ask(
    tasks: Sequence[AbilityTask], model: nn.Module, tokenizer: "PreTrainedTokenizerBase", which: str
) -> list[Answers]:
    reader = ModelReader(model)
    answers = []
    with track_count(f"ask the {which} model", "tasks", total=len(tasks)) as advance_to:
        for number, task in enumerate(tasks, start=1):
            answers.append(answer(task, reader, tokenizer))
            advance_to(number)
    return answers


def _write(folder: Path, found: dict[str, Any], answers: Both) -> None:
    (folder / RESULT).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    after = {one.task: one.scores for one in answers["edited"]}
    with open(folder / ANSWERS, "w", encoding="utf-8") as file:
        for one in answers["unedited"]:
            for document, score in one.scores.items():
                second = after.get(one.task, {}).get(document)
                row = {"task": one.task, "document": document, "unedited": score, "edited": second}
                file.write(json.dumps(row) + "\n")
    figure = abilities_figure(found)
    figure.savefig(folder / FIGURE, dpi=120)
    with SummaryWriter(str(folder / EVENTS)) as writer:
        writer.add_figure("abilities", figure)
        for task in found["tasks"]:
            tag = visible(task["name"])
            for stage in STAGES:
                writer.add_scalar(f"{tag}/{stage}", task[stage][0])
            if task["retention"] is not None:
                writer.add_scalar(f"{tag}/retention", task["retention"][0])
