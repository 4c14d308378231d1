"""What a report needs of a task, beside what the collection needs: figures with intervals, and what they depend on."""

from collections.abc import Mapping
from typing import Any, Protocol

from lightning import LightningModule, Trainer
from torch import nn

from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.metrics.described import Measures
from lightning_kfac.models.source import ModelSource


class Reported(Protocol):
    """A LightningModule whose evaluations are recorded. ``CausalLM`` and ``ImageClassifier`` are such.

    Attributes:
        stage: Name of the evaluation.
        record: Its figures, with ``intervals`` and ``differences``.
        evaluation: Of a language model: continuations and curves; None for another task.
        measures: Of a language model: what else is measured; None for another task.
        source, evaluated: Where the model of the run, and the one that is evaluated, come from.
        baseline_name: Name of the unedited model.
        labels, seed: Of the collection.
    """

    stage: str
    record: dict[str, Any]
    evaluation: Evaluation | None
    measures: Measures | None
    baseline_name: str | None
    labels: str
    seed: int

    @property
    def source(self) -> ModelSource | None:
        """Where the model of the run comes from."""

    @property
    def evaluated(self) -> ModelSource | None:
        """Where the model that is evaluated comes from."""

    @property
    def loaded(self) -> nn.Module:
        """The model."""


class ReportedData(Protocol):
    """The data module of such a task."""

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Identifies the tokenizer, if there is one."""

    def described(self) -> Mapping[str, Any]:
        """What figures depend on beside the model."""

    def hyperparameters(self) -> Mapping[str, Any]:
        """What TensorBoard lists of the run's data."""


def reported(pl_module: LightningModule) -> Reported:
    """The LightningModule of a run that is reported."""
    return pl_module  # type: ignore[return-value]  # Lightning's hooks say the base class


def reported_data(trainer: Trainer) -> ReportedData:
    """Its data module."""
    return trainer.datamodule  # type: ignore[attr-defined]  # a connector of Lightning's sets it
