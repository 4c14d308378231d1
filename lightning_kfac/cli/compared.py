"""Methods on one model: each is applied, measured once, and saved where it is the weakest that suppresses enough."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.curvature import Basis
from lightning_kfac.editing.edited_model import Named, Report
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.errors import InputError
from lightning_kfac.methods.curvature import CurvatureEdit
from lightning_kfac.methods.margins import margin_gradients
from lightning_kfac.methods.method import Method, WeightMethod
from lightning_kfac.methods.report import LayerChange, MethodReport
from lightning_kfac.methods.training import TrainedMethod
from lightning_kfac.models.dtypes import as_stored
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.source import origin
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.measured_training import Checkpoints, train_and_measure
from lightning_kfac.modules.unlearning import TRAININGS, check_trainable
from lightning_kfac.reporting.competitors import order_of
from lightning_kfac.storage.results import append_result, read_results

Row = Mapping[str, Any]
# Steps of a training after which it can go on.
KEPT_EVERY = 50


@dataclass(frozen=True)
class Done:
    """A method that was applied.

    Attributes:
        method: With its strength.
        model: Changed, as long as it is measured.
        report: What was done.
        seconds: That it took without its measurement; None where an earlier process began it.
    """

    method: Method
    model: nn.Module
    report: Report
    seconds: float | None


@dataclass(frozen=True)
class MeasuredReport:
    """The report of a model that is saved, with the result that belongs to it."""

    report: Report
    point: str

    @property
    def layers(self) -> Sequence[Named]:
        """What was done to each layer."""
        return self.report.layers

    def summary(self) -> dict[str, Any]:
        """The field ``edit`` of a result."""
        return self.report.summary()

    def to_dict(self) -> dict[str, Any]:
        """For ``edit.json``."""
        return self.report.to_dict() | {"point": self.point}


class Kinds:
    """Methods that differ in their strength alone, from weak to strong, by a label of their own."""

    def __init__(self, methods: Sequence[Method]):
        self.by_label: dict[str, list[Method]] = {}
        labels: dict[str, str] = {}
        for method in dict.fromkeys(methods):
            about = method.about()
            kind = json.dumps({k: v for k, v in about.items() if k != method.strength}, sort_keys=True)
            alike = sum(label.partition(" (")[0] == method.label for label in labels.values())
            label = labels.setdefault(kind, method.label + (f" ({alike + 1})" if alike else ""))
            self.by_label.setdefault(label, []).append(method)
        for of_kind in self.by_label.values():
            of_kind.sort(key=lambda method: order_of(about_strength(method)))


def about_strength(method: Method) -> dict[str, Any]:
    """The strength of a method, for results."""
    return {
        "strength": method.strength,
        "amount": method.amount,
        "falling": method.falling,
        "needs": method.needs,
    }


class Methods:
    """Applies methods to a model, and takes them back.

    Args:
        editor: Of the model, with the curvature of its layers.
        where: Which layers: blocks and projections.
        forget: What methods may see of the memorized set.
        retain: Text whose recall is to stay.
        folder: Of results; keeps what an interrupted training goes on from.
        accelerator: Where to train.
    """

    def __init__(
        self,
        editor: KFACEditor,
        where: EditConfig,
        forget: Sequence[MemorizedSequence],
        retain: Sequence[MemorizedSequence],
        folder: Path,
        accelerator: str,
    ):
        self.editor = editor
        self.where = where
        self.layers = editor.check(where)
        self.forget = forget
        self.retain = retain
        self.folder = folder
        self.accelerator = accelerator

    def check(self, methods: Sequence[Method]) -> None:
        """Raises ``InputError`` for a method that these layers cannot have."""
        for method in methods:
            if isinstance(method, CurvatureEdit):
                self.editor.check(self._config(method))
            if isinstance(method, TrainedMethod):
                check_trainable(self.layers, method.name)

    def run(self, methods: Sequence[Method], key: Callable[[Method], str], measure: Callable[[Done], None]) -> None:
        """Measures each method of one kind, from weak to strong.

        Args:
            methods: Of one kind.
            key: Identifies a method, and all that it depends on.
            measure: Called while the model is changed.
        """
        trained = [method for method in methods if isinstance(method, TrainedMethod)]
        if trained and trained[0].strength == "steps":  # one training
            self._train(trained, key, measure)
            return
        for method in methods:
            if isinstance(method, TrainedMethod):
                self._train([method], key, measure)
            elif isinstance(method, WeightMethod):
                self._change(method, measure)
            elif isinstance(method, CurvatureEdit):
                self._edit(method, measure)

    def _config(self, method: CurvatureEdit) -> EditConfig:
        return replace(method.config(), blocks=self.where.blocks, projections=self.where.projections)

    def _edit(self, method: CurvatureEdit, measure: Callable[[Done], None]) -> None:
        begin = time.monotonic()
        report = self.editor.apply(self._config(method))
        try:
            measure(Done(method, self.editor.model, report, time.monotonic() - begin))
        finally:
            self.editor.restore()

    @cached_property
    def _margins(self) -> tuple[dict[str, Tensor], float]:
        """The gradients of the margins of the forget set by the unedited model, and the seconds that they took."""
        begin = time.monotonic()
        model = self.editor.model
        home = next(model.parameters()).device
        model.to(self.editor.device or home)
        gradients = margin_gradients(model, self.layers, self.forget)
        model.to(home)
        return gradients, time.monotonic() - begin

    def _change(self, method: WeightMethod, measure: Callable[[Done], None]) -> None:
        model = self.editor.model
        gradients, before = self._margins if "forget set" in method.needs else ({}, 0.0)
        begin = time.monotonic()
        bases = self.editor.sources.bases
        kept = {layer.parameter: layer.parameter.detach().clone() for layer in self.layers.values()}
        changes = []
        try:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    device = torch.device(self.editor.device or layer.device)
                    basis = Basis(*bases.of(self.editor.sources.factors, name, device))
                    W = layer.W.to(device, bases.dtype)
                    after = method.changed(W, basis, name, gradients.get(name))
                    layer.write(layer.parameter.data, as_stored(model, after.to(layer.dtype)).to(layer.device))
                    changes.append(LayerChange.between(name, W, layer.W.to(device)))
            measure(Done(method, model, MethodReport(method, changes), before + time.monotonic() - begin))
        finally:
            for parameter, stored in kept.items():
                parameter.data.copy_(stored)

    def _train(
        self, methods: Sequence[TrainedMethod], key: Callable[[Method], str], measure: Callable[[Done], None]
    ) -> None:
        """One training that is measured after the steps of each method."""
        by_steps = {method.steps: method for method in methods}
        strongest = by_steps[max(by_steps)]
        begin = time.monotonic()
        training = TRAININGS[type(strongest)](self.editor.model, self.layers, self.forget, self.retain, strongest)
        measuring = 0.0

        def measured(step: int, model: nn.Module) -> None:
            nonlocal measuring
            start = time.monotonic()
            whole = len(training.losses) == step
            after = find_layers(model)
            changes = [
                LayerChange.between(name, layer.W, after[name].W.to(layer.device))
                for name, layer in self.layers.items()
            ]
            seconds = start - begin - measuring if whole else None
            measure(Done(by_steps[step], model, MethodReport(by_steps[step], changes), seconds))
            measuring += time.monotonic() - start

        kept = Checkpoints(self.folder, f"{strongest.name}-{key(replace(strongest, steps=0))}", "training")
        train_and_measure(training, sorted(by_steps), measured, self.folder, self.accelerator, kept, KEPT_EVERY)


class ComparedMethods:
    """Results of methods on disk, by what they depend on.

    Args:
        evaluator: Measures the model.
        results: The JSONL file.
        context: Everything that a figure depends on, but for the method, what it learns, and the device.
        text: Identifies the text that trained methods learn.

    Attributes:
        rows: Results by key.

    Raises:
        InputError: The file holds something else.
    """

    def __init__(self, evaluator: ModelEvaluator, results: Path, context: object, text: str):
        self.evaluator = evaluator
        self.results = results
        self.text = text
        self._context = repr(context)
        self.rows: dict[str | None, Row] = {row.get("point"): row for row in read_results(results)}
        if None in self.rows:
            raise InputError(f"{results} holds results of something else; choose another --output")

    @property
    def baseline(self) -> str:
        """The key of the unedited model."""
        return self._key("baseline")

    def key(self, method: Method) -> str:
        """Identifies a method in this context."""
        return self._key([method.about(), self.text if isinstance(method, TrainedMethod) else None])

    def measure_baseline(self, model: nn.Module) -> None:
        """Measures the unedited model, which nDCG and differences need in every process."""
        self.evaluator.module.stage = "baseline"
        self._keep(self.baseline, {"stage": "baseline", "edit": None, **self.evaluator(model)})

    def measure(self, done: Done, label: str) -> Row:
        """Measures what a method made of the model."""
        self.evaluator.module.stage = "edited"
        row = {"stage": "edited", "edit": done.report.summary(), **self.evaluator(done.model)}
        row["method"] = {"label": label, "seconds": done.seconds, **about_strength(done.method)}
        self._keep(self.key(done.method), row)
        return self.rows[self.key(done.method)]

    def _key(self, about: object) -> str:
        return hashlib.sha256(json.dumps([about, self._context], sort_keys=True).encode()).hexdigest()[:16]

    def _keep(self, key: str, row: Mapping[str, Any]) -> None:
        if key in self.rows:  # measured again for its values alone, or for its checkpoint
            return
        row = {"point": key, "context": self.baseline, **row, **origin(self.evaluator.module.source)}
        row["tokenizer_fingerprint"] = self.evaluator.data.tokenizer_fingerprint
        self.rows[key] = append_result(self.results, row)
