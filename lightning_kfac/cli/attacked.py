"""A model and its edit under attack, measured once: results on disk, by what they depend on."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kfac.attacks.attack import Attack
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.cli.learned import content_of_sequences, to_learn
from lightning_kfac.data.halves import Halves
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.errors import InputError
from lightning_kfac.math.statistics import Figure, interval, recovered_share
from lightning_kfac.metrics.registry import LABELS
from lightning_kfac.models.adapters import check_peft
from lightning_kfac.models.source import ModelSource, origin
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.measured_training import Checkpoints, train_and_measure
from lightning_kfac.modules.relearning import RelearningLM
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.storage.results import append_result, read_results
from lightning_kfac.storage.run_folder import STATE

# What is compared like with like; strict accuracy is compared with what an attack gets out word for word.
STRICT = "strict_acc"
COMPARED = ("loose_acc", "avg_levenshtein_norm", "extraction.expected_at.1000")
Row = Mapping[str, Any]


class AttackedModel:
    """Measures an edited model under attacks that are not in a results file yet.

    Args:
        evaluator: Measures, on sequences that no attack sees.
        results: The JSONL file.
        context: Everything that a figure depends on, but for the attack and the device.

    Attributes:
        rows: Results by key.

    Raises:
        InputError: The file holds something else.
    """

    def __init__(self, evaluator: ModelEvaluator, results: Path, context: object):
        self.evaluator = evaluator
        self.results = results
        self._context = repr(context)
        self._usual = evaluator.module.measures
        self._figures: dict[str, dict[str, Figure]] = {}
        self.rows: dict[str | None, Row] = {row.get("point"): row for row in read_results(results)}
        if None in self.rows:
            raise InputError(f"{results} holds results of something else; choose another --output")

    def key(self, about: Mapping[str, Any] | str) -> str:
        """Identifies an attack, or a stage without one, in this context."""
        text = json.dumps([about, self._context], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def done(self, about: Mapping[str, Any]) -> bool:
        """Whether an attack is in the file already."""
        return self.key(about) in self.rows

    def measure_pair(
        self, unedited: Callable[[], nn.Module], edited: nn.Module, source: ModelSource | None = None
    ) -> None:
        """What every attack is compared with: both models without one. Values are needed in every process.

        Args:
            unedited: Loads the unedited model, which is not kept.
            source: Where that comes from, if not from where the evaluator's model does.
        """
        for stage, model in (("baseline", unedited()), ("edited", edited)):
            self.evaluator.module.stage = stage
            row = self.evaluator(model)
            self._figures[stage] = dict(self.evaluator.module.latest.figures)
            self._keep(self.key(stage), stage, row, source if stage == "baseline" else None)

    def measure(self, attack: Attack, model: nn.Module, about: Mapping[str, Any] | None = None) -> None:
        """Measures a model that is under attack, after ``measure_pair``.

        Args:
            about: Name and settings for the results; by default the attack's own.
        """
        about = attack.about() if about is None else about
        module = self.evaluator.module
        module.stage = "attacked"
        module.measures = attack.measures(self._usual)
        try:
            row = dict(self.evaluator(model))
        finally:
            module.measures = self._usual
        figures = module.latest.figures
        got = attack.got(figures)
        shares = {STRICT: self._share(STRICT, got)}
        if attack.figure == STRICT:
            shares |= {name: self._share(name, figures[name]) for name in COMPARED if name in figures}
        row |= {"attack": dict(about), "label": attack.label, "recovered": shares}
        row["got"] = _plain([got.value, *interval(got)])
        self._keep(self.key(about), "attacked", row)

    def shown(self, abouts: Iterable[Mapping[str, Any]]) -> list[Row]:
        """The rows of both models and of some attacks."""
        keys = [self.key("baseline"), self.key("edited"), *map(self.key, abouts)]
        return [self.rows[key] for key in dict.fromkeys(keys) if key in self.rows]

    def _share(self, name: str, attacked: Figure) -> list[float | None] | None:
        falls = LABELS[name].better == "lower"
        share = recovered_share(self._figures["baseline"][name], self._figures["edited"][name], attacked, falls)
        return None if share is None else _plain(share)

    def _keep(self, key: str, stage: str, row: Row, source: ModelSource | None = None) -> None:
        if key in self.rows:  # measured again for its values alone
            return
        row = {"stage": stage, "point": key, "context": self.key("baseline"), **row}
        row |= origin(source or self.evaluator.module.source)
        row["tokenizer_fingerprint"] = self.evaluator.data.tokenizer_fingerprint
        self.rows[key] = append_result(self.results, row)


@dataclass(frozen=True)
class PlannedAttack:
    """An attack and its measurements.

    Attributes:
        attack: What is done.
        abouts: Name and settings of each measurement, for the results.
        learned: Of a relearning: what is learned.
    """

    attack: Attack
    abouts: tuple[dict[str, Any], ...]
    learned: tuple[MemorizedSequence, ...] = ()

    @classmethod
    def of(cls, attack: Attack, halves: Halves, data: TextData, edited: ModelSource, folder: Path) -> "PlannedAttack":
        """With what a relearning learns.

        Args:
            attack: What is done.
            halves: Of the memorized set.
            data: Whose corpus a relearning of text learns.
            edited: The model.
            folder: For tokenized text.
        """
        if not isinstance(attack, Relearning):
            return cls(attack, (attack.about(),))
        if attack.weights == "lora":
            check_peft("attacks: relearning: weights lora")
        learned = to_learn(attack.source, halves, data, edited, folder)
        of = {"n_learned": len(learned), "learned": content_of_sequences(learned)}
        return cls(attack, tuple(attack.after(step) | of for step in attack.steps), tuple(learned))

    def run(
        self, measured: AttackedModel, model: nn.Module, folder: Path, accelerator: str, on_done: Callable[[], None]
    ) -> None:
        """Measures what is not in the results yet."""
        missing = {about.get("steps"): about for about in self.abouts if not measured.done(about)}
        if not missing:
            return
        if not isinstance(self.attack, Relearning):
            with self.attack.on(model):
                measured.measure(self.attack, model)
            on_done()
            return
        attack = replace(self.attack, steps=tuple(about["steps"] for about in missing.values()))

        def measure(step: int, relearned: nn.Module) -> None:
            measured.measure(attack, relearned, missing[step])
            on_done()

        same = {key: value for key, value in self.abouts[0].items() if key != "steps"}
        kept = Checkpoints(folder / STATE, f"relearning-{measured.key(same)}")
        train_and_measure(RelearningLM(model, self.learned, attack), attack.steps, measure, folder, accelerator, kept)


def _plain(numbers: Iterable[float]) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers]
