"""What a model can do, and what an edit leaves of it: tasks answered question by question, and two models compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from lightning_kfac.data.ability_tasks import GROUPS, AbilityTask
from lightning_kfac.data.loaders import TokenRows, row_loader
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.decoding import greedy_continuations
from lightning_kfac.evaluation.excitation import excitation, layer_forms
from lightning_kfac.evaluation.leaks import text_losses
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.paired import is_binary, mcnemar, retention
from lightning_kfac.math.statistics import Estimate, Figure, interval, rank_correlation, rank_correlation_interval
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.language import language_model, most_positions
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.loading import end_of_text_ids
from lightning_kfac.storage.json_files import for_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 64
BUILT_IN = "built-in"
FEWEST_CORRELATED = 4
# The components of lowest importance that hold so large a share of their number: the last cut of the paper's figure 2.
LOW = 0.5


class Reader(Protocol):
    """What answers: a model, or what stands in for one."""

    def losses(self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]) -> Sequence[float]:
        """-log p of each option after its prompt, in nats."""

    def writes(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Each prompt continued by so many tokens, or to the end of the text."""


class ModelReader:
    """A causal language model that answers.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: nn.Module):
        self.model = language_model(model)
        self.end_of_text = end_of_text_ids(self.model)

    def losses(self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]) -> list[float]:
        """From one forward over prompt and option."""
        means = text_losses(self.model, prompts, options)
        return [mean * len(option) for mean, option in zip(means, options, strict=True)]

    @torch.no_grad()
    def writes(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Greedily."""
        written: list[list[int]] = []
        for start in range(0, len(prompts), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            written += greedy_continuations(self.model, prompts[some], lengths[some], self.end_of_text)
        return written


@dataclass(frozen=True)
class Answers:
    """The scores of one model on one task.

    Attributes:
        task, group: As ``AbilityTask`` has them; a group may also be the user's own.
        metric: What a score is.
        scores: In [0, 1] by document: the number or the name of a question.
        chance: Share that a constant answer gets right, where it is known.
        source: Where the task comes from.
    """

    task: str
    group: str
    metric: str
    scores: Mapping[str, float]
    chance: float | None = None
    source: str = BUILT_IN


def answer(task: AbilityTask, reader: Reader, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Answers:
    """Asks every question of a task.

    Args:
        tokenizer: Needed for answers that are numbers, to see whether a digit follows.

    Returns:
        Scores of 0 and 1. Of options equally likely the first one counts as chosen.
    """
    right = _chosen(task, reader) if task.chooses else _written(task, reader, tokenizer)
    scores = {str(number): float(verdict) for number, verdict in enumerate(right)}
    return Answers(task.name, task.group, task.metric, scores, task.chance)


def _chosen(task: AbilityTask, reader: Reader) -> list[bool]:
    pairs = [(one.prompt, option) for one in task.asked for option in one.options]
    losses = iter(reader.losses([prompt for prompt, _ in pairs], [option for _, option in pairs]))
    return [int(np.argmin([next(losses) for _ in one.options])) == one.right for one in task.asked]


def _written(task: AbilityTask, reader: Reader, tokenizer: "PreTrainedTokenizerBase | None") -> list[bool]:
    golds = [one.options[0] for one in task.asked]
    written = reader.writes([one.prompt for one in task.asked], [len(gold) + task.numbers for gold in golds])
    right = [list(ids[: len(gold)]) == gold for ids, gold in zip(written, golds, strict=True)]
    if not task.numbers:
        return right
    if tokenizer is None:
        raise InputError("answers that are numbers need the tokenizer")
    return [
        verdict and not _begins_with_digit(ids[len(gold) :], tokenizer)
        for verdict, ids, gold in zip(right, written, golds, strict=True)
    ]


def _begins_with_digit(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(ids) and str(tokenizer.decode(list(ids)))[:1].isdigit()


def check_lengths(tasks: Sequence[AbilityTask], model: nn.Module) -> None:
    """Raises ``InputError`` for a question that is longer than the model takes."""
    most = most_positions(language_model(model).config.get_text_config())
    for task in tasks:
        longest = max(len(one.prompt) + len(option) + task.numbers for one in task.asked for option in one.options)
        if most is not None and longest > most:
            raise InputError(f"{task.name}: a question of {longest} tokens, but the model takes at most {most}")


class Kept(NamedTuple):
    """What an edit leaves of a task, or of a group of them.

    Attributes:
        name: Of the task or the group.
        group: Of the task.
        metric, source: As ``Answers`` has them; of a group those of its tasks.
        n: Documents that both models answered.
        chance: See ``Answers``.
        unedited, edited: Mean scores with 95 % intervals.
        retention: edited / unedited; None where the unedited model has no score.
        lost, gained: Documents that only the unedited model answered right, and only the edited one; None where scores
            are not right and wrong.
        p: Of McNemar's test; None where scores are not right and wrong.
    """

    name: str
    group: str
    metric: str
    source: str
    n: int
    chance: float | None
    unedited: Estimate
    edited: Estimate
    retention: Estimate | None
    lost: int | None
    gained: int | None
    p: float | None

    def record(self) -> dict[str, Any]:
        """For JSON: estimates as value, low, high."""
        fields = {
            name: [value.value, value.low, value.high] if isinstance(value, Estimate) else value
            for name, value in self._asdict().items()
        }
        return for_json(fields | {"at_chance": self.at_chance})

    @property
    def at_chance(self) -> bool:
        """The unedited model does no better than a constant answer, so that there is nothing to keep."""
        return self.retention is None or (self.chance is not None and self.unedited.low <= self.chance)


def compare(unedited: Sequence[Answers], edited: Sequence[Answers]) -> tuple[list[Kept], list[Kept]]:
    """Two models task by task, and group by group over all documents of a group's tasks.

    Tasks are compared where both models answered them, documents by their names.

    Raises:
        InputError: No task, or of a task no document, was answered by both.
    """
    theirs = {answers.task: answers for answers in edited}
    pairs = [(answers, theirs[answers.task]) for answers in unedited if answers.task in theirs]
    if not pairs:
        names = ", ".join(answers.task for answers in unedited) or "none"
        raise InputError(f"no task was answered by both models; by the unedited one: {names}")
    scores = {before.task: _in_common(before, after) for before, after in pairs}
    pairs.sort(key=lambda pair: _place(pair[0].group))
    tasks = [_kept(before, before.task, scores[before.task]) for before, _ in pairs]
    groups = []
    for group, members in groupby((before for before, _ in pairs), key=lambda answers: answers.group):
        some = list(members)
        groups.append(_kept(_joined(some), group, np.concatenate([scores[one.task] for one in some])))
    return tasks, groups


def _place(group: str) -> tuple[int, str]:
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def _joined(some: Sequence[Answers]) -> Answers:
    """What several tasks have in common; the chance of all is known where that of each is."""
    chances = [one.chance for one in some]
    known = [chance for chance in chances if chance is not None]
    total = sum(len(one.scores) for one in some)
    chance = sum(c * len(one.scores) for c, one in zip(known, some, strict=False)) / total
    metric = ", ".join(dict.fromkeys(one.metric for one in some))
    source = ", ".join(dict.fromkeys(one.source for one in some))
    return Answers("", some[0].group, metric, {}, chance if len(known) == len(chances) else None, source)


def _in_common(before: Answers, after: Answers) -> np.ndarray:
    """Scores [n, 2] of the documents that both have."""
    if before.metric != after.metric:
        raise InputError(f"{before.task}: judged by {before.metric} before and by {after.metric} after the edit")
    names = [name for name in before.scores if name in after.scores]
    if not names:
        raise InputError(f"{before.task}: the two models answered no document in common")
    return np.array([[before.scores[name], after.scores[name]] for name in names])


def _kept(about: Answers, name: str, scores: np.ndarray) -> Kept:
    first, second = scores.T
    binary = is_binary(scores)
    return Kept(
        name,
        about.group,
        about.metric,
        about.source,
        len(scores),
        about.chance,
        _mean(first, binary),
        _mean(second, binary),
        retention(first, second),
        int((first > second).sum()) if binary else None,
        int((first < second).sum()) if binary else None,
        mcnemar(first, second) if binary else None,
    )


def _mean(scores: np.ndarray, binary: bool) -> Estimate:
    figure = Figure(torch.from_numpy(scores), torch.ones(len(scores), dtype=torch.float64), rate=binary)
    return Estimate(figure.value, *interval(figure))


def task_texts(tasks: Sequence[AbilityTask]) -> dict[str, list[list[int]]]:
    """Prompts with their right answers, as token ids, by task."""
    return {task.name: [[*one.prompt, *one.options[one.right]] for one in task.asked] for task in tasks}


def low_shares(
    model: nn.Module,
    factors: Mapping[str, KroneckerFactors],
    bases: BasisCache,
    texts: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, float]:
    """Share of each task's activation energy in the low bands, mean over layers.

    Of a layer: sum over positions of ||W_low x||^2 over the same of both bands (``math/bands.py``), where W_low holds
    the half of the components with the lowest importance.

    Args:
        model: The unedited one.
        factors: Of its layers.
        bases: Their eigenbases.
        texts: Token ids of each task.
    """
    forms = layer_forms(model, factors, bases, [1 - LOW, 1.0])
    shares = {}
    for task, texts_of_task in texts.items():
        ids = [np.asarray(text, dtype=np.int32) for text in texts_of_task]
        rows = TokenRows(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))
        found = excitation(model, factors, forms, [row_loader(rows, AT_ONCE, 0, 1)])
        energies = [layer.energies.sum(0) for layer in found.values()]
        shares[task] = float(np.mean([low / (high + low) for high, low, _ in energies]))
    return shares


class Correlation(NamedTuple):
    """Of what tasks lose with a share.

    Attributes:
        value: Spearman's, with its 95 % interval.
        tasks: Those that count.
    """

    value: Estimate
    tasks: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return for_json({"value": [self.value.value, self.value.low, self.value.high], "tasks": list(self.tasks)})


def loss_and_share(tasks: Sequence[Kept], shares: Mapping[str, float]) -> Correlation | None:
    """Spearman's correlation over tasks of what an edit takes (1 - retention) with a share of each task.

    Tasks at chance have nothing to lose and are left out. None for fewer than four others, or where one side has no
    order.
    """
    lost = {t.name: 1 - t.retention.value for t in tasks if t.name in shares and t.retention and not t.at_chance}
    if len(lost) < FEWEST_CORRELATED:
        return None
    value = rank_correlation(list(lost.values()), [shares[name] for name in lost])
    if math.isnan(value):
        return None
    return Correlation(Estimate(value, *rank_correlation_interval(value, len(lost))), tuple(lost))


def check_factors(model: nn.Module, factors: FactorFolder) -> None:
    """Raises ``InputError`` for factors of layers that the model does not have, or of other weights."""
    layers = find_layers(model)
    if missing := [name for name in factors if name not in layers]:
        raise InputError(f"{factors.path}: factors of another model: the unedited one has no layer {missing[0]}")
    known = factors.metadata.get("fingerprint")
    if known and known != weights_fingerprint(model, factors):
        raise InputError(f"{factors.path}: collected from other weights than those of the unedited model")
