"""ModelEvaluator: measures a model again and again, on data that are prepared once."""

from pathlib import Path
from typing import Any

from torch import nn

from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.distributed.strategies import evaluation_trainer
from lightning_kfac.errors import InputError
from lightning_kfac.metrics.described import Measures
from lightning_kfac.models.language import language_model
from lightning_kfac.models.loading import Dtype
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData


class ModelEvaluator:
    """Recitation, perplexity and nDCG of a model as it is, by the validation loop of a Trainer.

    The first evaluation is the reference of nDCG: begin with the unedited model.

    Args:
        model: Where the model came from.
        dtype: Of its weights.
        data: Memorized sets, held-out text, questions.
        folder: For tokenized text.
        accelerator: As for a Trainer.
        measures: What else to measure.

    Raises:
        InputError: There is nothing to measure, the data do not fit the model, or there is no such accelerator here.
    """

    def __init__(
        self,
        model: ModelSource,
        dtype: Dtype,
        data: TextData,
        folder: Path,
        accelerator: str = "auto",
        measures: Measures = Measures(),  # noqa: B008 (frozen)
    ) -> None:
        self.module = CausalLM(dtype=dtype, measures=measures, **model.settings())
        self.data = data
        data.read_as(model)
        data.check(self.module.vocab_size, self.module.max_positions)
        if not data.validation_names:
            raise InputError("there is nothing to evaluate on: set data.memorized or data.heldout")
        self.trainer = evaluation_trainer(folder, accelerator)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """All figures under the names of ``results.jsonl``, with intervals and differences from the first model."""
        home = next(model.parameters()).device
        self.module.model = language_model(model)
        self.trainer.validate(self.module, self.data, verbose=False)
        model.to(home)
        return self.module.record

    def example(self) -> dict[str, Any]:
        """How the model that was just measured continues the first sequence, for a report."""
        data = self.data
        found = self.module.latest.continuations.get(MEMORIZED, {}).get(0)
        if found is None:
            return {}
        first = data.sequences(MEMORIZED)[0]
        texts = {"prefix": first.prefix, "gold": first.suffix, "after": found}
        return {"example": {name: data.decode(list(ids)) for name, ids in texts.items()}}
