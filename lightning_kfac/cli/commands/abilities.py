"""Show what an edit leaves of each ability: the same questions to the unedited and the edited model, task by task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.cli.options import add_model_options, check_not_within, named_model, open_model, output_folder
from lightning_kfac.console import console, show, track_count, visible
from lightning_kfac.data.ability_tasks import AbilityTask, local_tasks, recitation_task
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.editing.edited_model import find_reference
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.abilities import (
    Answers,
    ModelReader,
    answer,
    check_factors,
    check_lengths,
    compare,
    loss_and_share,
    low_shares,
)
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.models.language import vocabulary_size
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
ANSWERS = "answers.jsonl"
FIGURE = "abilities.png"
LEAST_QUESTIONS = 4


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, otherwise="The edited one, whose edit.json names the unedited one.")
    parser.add_argument("--unedited", type=str, help="The model before the edit; by default the one in edit.json.")
    corpus = "Text to ask about: embedded, a file or folder, a hub data set. Best what the model was trained on."
    parser.add_argument("--corpus", type=str | dict[str, Any], default="embedded", help=corpus)
    parser.add_argument("--memorized", type=str, help="What the unedited model recites: a memorized set.")
    parser.add_argument("--questions", type=int, default=120, help="Questions a task.")
    parser.add_argument("--seed", type=int, default=0, help="Decides which questions are asked.")
    factors = "Factor folder of the unedited model: is more lost where more activation energy is in low bands?"
    parser.add_argument("--factors", type=str, help=factors)
    differing = "Where transformers ignores tokenizer.json: use the file's own tokenizer (true) or the other (false)."
    parser.add_argument("--data.own_tokenizer", type=bool | None, default=None, help=differing)
    parser.add_argument("--output", type=str, default="runs/abilities", help="Folder of figures, answers, TensorBoard.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")


def run(options: Namespace) -> None:
    """Asks both models, compares and shows."""
    if options.questions < LEAST_QUESTIONS:
        raise InputError(f"--questions is {options.questions}; it must be at least {LEAST_QUESTIONS}")
    if not options.model:
        raise InputError("--model is missing: the edited model, a folder that fit or apply wrote")
    edited = named_model(options, {}, "")
    unedited = _unedited(options, edited)
    corpus = Corpus.parse(options.corpus)
    corpus.check()
    inputs = {"the model": edited, "the unedited model": unedited, "the factors": options.factors}
    check_not_within(Path(options.output), inputs)
    with output_folder(options, "abilities") as output:
        found, answers = _measured(options, unedited, edited, corpus)
        with new_folder(output.new) as partial:
            _write(partial, found, answers)
    show(abilities_table(found))
    if said := correlation_line(found):
        console.print(said)
    console.print(f"{RESULT}, {ANSWERS}, {FIGURE} and tensorboard/ are in {output.path}/")


def _unedited(options: Namespace, edited: ModelSource) -> ModelSource:
    """The model before the edit, known before anything is loaded."""
    unedited, why = find_reference(edited, options.unedited, load_config(edited).get_text_config().vocab_size)
    if unedited is None:
        raise InputError(f"{edited}: {why}; name the unedited model with --unedited")
    return unedited


def _measured(
    options: Namespace, unedited: ModelSource, edited: ModelSource, corpus: Corpus
) -> tuple[dict[str, Any], tuple[list[Answers], list[Answers]]]:
    """What is written, and the answers of both models."""
    tokenizer = load_tokenizer(edited, own_tokenizer=options.data.own_tokenizer)
    model = open_model(unedited, options)
    tasks = local_tasks(corpus.documents(), tokenizer, options.questions, options.seed)
    if options.memorized:
        sequences = load_memorized(options.memorized, tokenizer, vocabulary_size(model))
        tasks.append(recitation_task(sequences))
    check_lengths(tasks, model)
    shares = _low_shares(options, model, tasks)
    before = _ask(tasks, model, tokenizer, "unedited")
    after = _ask(tasks, open_model(edited, options), tokenizer, "edited")
    kept, groups = compare(before, after)
    correlation = loss_and_share(kept, shares)
    found = {
        **edited.about(),
        "unedited": unedited.about(),
        "corpus": corpus.label,
        "memorized": options.memorized,
        "questions": options.questions,
        "seed": options.seed,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "tasks": [task.record() for task in kept],
        "groups": [group.record() for group in groups],
        "low_shares": shares,
        "correlation": correlation and correlation.record(),
    }
    return found, (before, after)


def _low_shares(options: Namespace, model: nn.Module, tasks: Sequence[AbilityTask]) -> dict[str, float]:
    if not options.factors:
        return {}
    factors = load_factors(options.factors)
    check_factors(model, factors)
    with track_count("low bands", "tasks", total=len(tasks)) as advance_to:
        shares = low_shares(model, factors, BasisCache.beside(factors), tasks)
        advance_to(len(tasks))
    return shares


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


def _write(folder: Path, found: dict[str, Any], answers: tuple[list[Answers], list[Answers]]) -> None:
    (folder / RESULT).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    after = {one.task: one.scores for one in answers[1]}
    with open(folder / ANSWERS, "w", encoding="utf-8") as file:
        for one in answers[0]:
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
            for stage in ("unedited", "edited"):
                writer.add_scalar(f"{tag}/{stage}", task[stage][0])
            if task["retention"] is not None:
                writer.add_scalar(f"{tag}/retention", task["retention"][0])
