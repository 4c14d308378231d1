"""The evaluation of a language model in Lightning's validation loop."""

import hashlib
from collections.abc import Collection
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning import LightningModule
from torch import nn

from lightning_kfac.data.names import HELDOUT
from lightning_kfac.data.tokenized import tokenizer_key
from lightning_kfac.distributed.lockstep import Lockstep
from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.evaluation.log import EvaluationLog
from lightning_kfac.metrics.described import Measures
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import end_of_text_ids
from lightning_kfac.models.tokens import TokenBatch


class EvaluatedLM(LightningModule):
    """A language model that validation loops evaluate, one stage after the other.

    The data module names its loaders: ``set_names``, ``question_sets``, ``validation_names`` (see ``TextData``).

    Args:
        measures: What else to measure, and the threshold of loose recitation.

    Attributes:
        model: The language model, once it is loaded.
        stage: Name of the next evaluation: ``baseline``, ``edited`` or, in a training, ``trained``.
        evaluated: Name of the model that is loaded.
        edited_layers: Names of the layers whose weights an edit may have changed.
        evaluation_folder: Where to keep what an interrupted evaluation goes on from; None keeps nothing.
        evaluation: The latest evaluation; ``baseline`` is that of the unedited model.
        baseline_name: Name of the unedited model that was evaluated.
        results: Figures of the latest evaluation, and ``record`` the same with intervals and differences.
        lockstep: Keeps ranks together that run a sharded model unequally often; None where the model is whole.
    """

    def __init__(self, measures: Measures):
        super().__init__()
        self.measures = measures
        self.model: nn.Module | None = None
        self.stage = "baseline"
        self.evaluated: str | None = None
        self.edited_layers: Collection[str] = ()
        self.evaluation_folder: Path | None = None
        self.evaluation: Evaluation | None = None
        self.baseline: Evaluation | None = None
        self.baseline_name: str | None = None
        self.results: dict[str, float | int | None] = {}
        self.record: dict[str, Any] = {}
        self.lockstep: Lockstep | None = None

    def on_validation_epoch_start(self) -> None:
        data = self.trainer.datamodule
        baseline = "self" if self.stage == "baseline" else self.baseline
        self.evaluation = Evaluation(
            data.set_names,
            data.question_sets,
            end_of_text_ids(self.model),
            baseline,
            self.measures,
            self._evaluation_log(),
        )
        self.evaluation.to(self.device)

    def _evaluation_log(self) -> EvaluationLog | None:
        if self.evaluation_folder is None or self.trainer.sanity_checking:
            return None
        data, config = self.trainer.datamodule, self.model.config.to_json_string()
        about = data.measured(), self.measures, self.stage, self.trainer.world_size, version("lightning-kfac")
        about += (
            config,
            sorted(end_of_text_ids(self.model)),
            tokenizer_key(data.tokenizer) if data.tokenizer_name else "",
        )
        numbers = weights_fingerprint(self.model, self.edited_layers), str(self.model.dtype), self.trainer.precision
        key = hashlib.sha256(repr((about, numbers)).encode()).hexdigest()[:32]
        folder = self.evaluation_folder / f"evaluation-{self.stage.replace(' ', '-')}"
        return EvaluationLog(folder, key, self.trainer.global_rank)

    def validation_step(self, batch: TokenBatch | dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch of a memorized set, of questions or of the held-out text, told apart by the loader's name."""
        with self.lockstep or nullcontext():
            self._evaluate(batch, self.trainer.datamodule.validation_names[dataloader_idx])

    def _evaluate(self, batch: TokenBatch | dict, name: str) -> None:
        data = self.trainer.datamodule
        if name == HELDOUT:
            self.evaluation.add_text(self.model, batch)
        elif name in data.question_sets:
            questions = [data.questions(name)[index] for index in batch["index"]]
            self.evaluation.add_questions(name, self.model, questions, batch["index"], data.tokenizer.decode)
        else:
            self.evaluation.add_sequences(name, self.model, batch)

    def on_validation_epoch_end(self) -> None:
        self.results = self.evaluation.results()
        intervals, differences = self.evaluation.intervals(), self.evaluation.differences()
        self.record = {**self.results, "intervals": intervals, "differences": differences}
        if self.stage == "baseline":
            self.baseline, self.baseline_name = self.evaluation, self.evaluated
        self._log_figures("val", {name: [value] for name, value in self.results.items()}, [""])
        self._log_figures("change", {name: values[:1] for name, values in differences.items()}, [""])
        # Groups of their own: TensorBoard gives every number a chart.
        self._log_figures("val_interval", intervals, ["/low", "/high"])
        self._log_figures("change_interval", {name: v[1:] for name, v in differences.items()}, ["/low", "/high"])

    def _log_figures(self, group: str, figures: dict[str, list], parts: list[str]) -> None:
        self.log_dict(
            {
                f"{group}/{self.stage}/{name}{part}": float(value)
                for name, values in figures.items()
                for part, value in zip(parts, values, strict=True)
                if value is not None
            }
        )
