"""The evaluation of a language model in Lightning's validation loop."""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningModule
from torch import nn
from typing_extensions import override

from lightning_kfac.distributed.lockstep import Lockstep
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.evaluation.leaks import text_losses
from lightning_kfac.evaluation.log import EvaluationLog
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.metrics.described import Measures
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import end_of_text_ids, load_model
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.modules.text_data import text_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EvaluatedLM(LightningModule):
    """A language model that validation loops evaluate, one stage after the other.

    The data module names its loaders: ``set_names``, ``question_sets``, ``validation_names`` (see ``TextData``).

    Args:
        measures: What else to measure, and the threshold of loose recitation.

    Attributes:
        model: The language model, once it is loaded.
        stage: Name of the next evaluation: ``baseline``, ``edited`` or, in a training, ``trained``.
        evaluated: Where the model that is loaded comes from.
        edited_layers: Names of the layers whose weights an edit may have changed.
        evaluation_folder: Where to keep what an interrupted evaluation goes on from; None keeps nothing.
        evaluation: The latest evaluation; ``baseline`` is that of the unedited model.
        baseline_name: Name of the unedited model that was evaluated.
        results: Figures of the latest evaluation, and ``record`` the same with intervals and differences.
        reference_losses: Of members and non-members by the reference model: class to number to mean loss, of this
            rank's texts; None where there is no such model.
        lockstep: Keeps ranks together that run a sharded model unequally often; None where the model is whole.
    """

    def __init__(self, measures: Measures):
        super().__init__()
        self.measures = measures
        self.model: PreTrainedModel | None = None
        self.stage = "baseline"
        self.evaluated: ModelSource | None = None
        self.edited_layers: Collection[str] = ()
        self.evaluation_folder: Path | None = None
        self.evaluation: Evaluation | None = None
        self.baseline: Evaluation | None = None
        self.baseline_name: str | None = None
        self.results: dict[str, float | int | None] = {}
        self.record: dict[str, Any] = {}
        self.reference_losses: dict[str, dict[int, float]] | None = None
        self.lockstep: Lockstep | None = None

    @property
    def loaded(self) -> "PreTrainedModel":
        """The model; raises ``RuntimeError`` before it is loaded."""
        if self.model is None:
            raise RuntimeError("the model is not loaded yet: a Trainer calls configure_model, or call it yourself")
        return self.model

    @property
    def latest(self) -> Evaluation:
        """The evaluation that runs or was the last; raises ``RuntimeError`` before the first."""
        if self.evaluation is None:
            raise RuntimeError("nothing was evaluated yet: an evaluation begins with a validation loop")
        return self.evaluation

    @override
    def on_train_start(self) -> None:
        self._try_out()

    @override
    def on_validation_start(self) -> None:
        self._try_out()

    @override
    def on_predict_start(self) -> None:
        self._try_out()

    def _try_out(self) -> None:
        """Before the work, on every rank: a model that cannot be measured is refused."""
        if self.model is not None:
            manner_of(self.model)

    @override
    def on_validation_epoch_start(self) -> None:
        data = text_data(self.trainer)
        if self.measures.leaks.reference and data.sets.classes and self.reference_losses is None:
            self.reference_losses = self._losses_by(self.measures.leaks.reference)
        baseline = "self" if self.stage == "baseline" else self.baseline
        self.evaluation = Evaluation(
            data.set_names,
            data.question_sets,
            end_of_text_ids(self.loaded),
            baseline,
            self.measures,
            self._evaluation_log(),
            data.heldout_rows,
            self._bulk_share(),
        )
        self.evaluation.to(self.device)

    def _bulk_share(self) -> BulkShare | None:
        """Where factors are named, what listens to their layers of the model as it is now."""
        if self.measures.leaks.factors is None or not text_data(self.trainer).sets.classes:
            return None
        return BulkShare(self.loaded, load_factors(self.measures.leaks.factors))

    def _losses_by(self, reference: str) -> dict[str, dict[int, float]]:
        """Losses of this rank's members and non-members by another model, which is then let go."""
        model: nn.Module = load_model(reference)
        model.to(self.device)
        losses: dict[str, dict[int, float]] = {}
        for name, texts in text_data(self.trainer).sets.scored.items():
            numbers = range(self.trainer.global_rank, len(texts), self.trainer.world_size)
            mine = [texts[number] for number in numbers]
            found = text_losses(model, [text.prefix for text in mine], [text.suffix for text in mine])
            losses[name] = dict(zip(numbers, found, strict=True))
        return losses

    def _evaluation_log(self) -> EvaluationLog | None:
        if self.evaluation_folder is None or self.trainer.sanity_checking:
            return None
        data = text_data(self.trainer)
        model = self.loaded
        factors = self.measures.leaks.factors
        about = (
            data.measured(),
            self.measures,
            None if factors is None else load_factors(factors).content(),
            self.stage,
            self.trainer.world_size,
            version("lightning-kfac"),
            model.config.to_json_string(),
            sorted(end_of_text_ids(model)),
        )
        numbers = weights_fingerprint(model, self.edited_layers), str(model.dtype), self.trainer.precision
        key = hashlib.sha256(repr((about, numbers)).encode()).hexdigest()[:32]
        folder = self.evaluation_folder / f"evaluation-{self.stage.replace(' ', '-')}"
        return EvaluationLog(folder, key, self.trainer.global_rank)

    @override
    def validation_step(
        self, batch: TokenBatch | Mapping[str, list[Any]], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """One batch of tokens of the held-out text, or of a memorized set or questions, which the loader names."""
        with self.lockstep or nullcontext():
            name = text_data(self.trainer).validation_names[dataloader_idx]
            self._evaluate(batch, name)
            trainer = self.trainer
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            if name in self.latest.sets and batch_idx + 1 == counts[dataloader_idx]:
                self.latest.finish_sequences(
                    name
                )  # here, where the precision is that of a step and ranks keep together

    def _evaluate(self, batch: TokenBatch | Mapping[str, list[Any]], name: str) -> None:
        data = text_data(self.trainer)
        if isinstance(batch, TokenBatch):
            self.latest.add_text(self.loaded, batch)
        elif name in data.question_sets:
            questions = [data.questions(name)[index] for index in batch["index"]]
            self.latest.add_questions(name, self.loaded, questions, batch["index"], data.decode)
        elif name in data.sets.classes:
            losses = None if self.reference_losses is None else self.reference_losses[name]
            self.latest.add_members(name, self.loaded, batch, data.decode, losses)
        else:
            self.latest.add_sequences(name, self.loaded, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.results = self.latest.results()
        intervals = self.latest.intervals()
        differences = self.latest.differences()
        settings = self.latest.settings
        self.record = {**self.results, **settings, "intervals": intervals, "differences": differences}
        if self.stage == "baseline":
            self.baseline = self.evaluation
            self.baseline_name = None if self.evaluated is None else str(self.evaluated)
        # Their intervals are in the lines from before to after that a RunReport shows.
        self._log_figures("val", self.results)
        self._log_figures("change", {name: values[0] for name, values in differences.items()})

    def _log_figures(self, group: str, figures: Mapping[str, float | None]) -> None:
        known = {name: float(value) for name, value in figures.items() if value is not None}
        self.log_dict({f"{group}/{self.stage}/{name}": value for name, value in known.items()})
