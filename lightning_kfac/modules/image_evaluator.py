"""ImageEvaluator: for images what ``ModelEvaluator`` is for language models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kfac.distributed.strategies import evaluation_trainer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.image_classifier import ImageClassifier
from lightning_kfac.modules.image_data import ImageData


class ImageEvaluator:
    """Accuracies of a classifier as it is, by the validation loop of a Trainer, on the images of its collection.

    Args:
        model: Where the model came from.
        images: What the factors say of their images.
        folder: Default root of the Trainer.
        accelerator: As for a Trainer.
    """

    def __init__(self, model: ModelSource, images: Mapping[str, Any], folder: Path, accelerator: str = "auto"):
        self.module = ImageClassifier(model_name=str(model.path))
        self.data = ImageData(images["wrong_labels"], images["n_validation"], seed=images["data_seed"])
        self.trainer = evaluation_trainer(folder, accelerator)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """All figures under the names of ``results.jsonl``, with intervals and differences from the first model."""
        home = next(model.parameters()).device
        self.module.model = model  # type: ignore[assignment]  # the one that was opened for the sweep
        self.trainer.validate(self.module, self.data, verbose=False)
        model.to(home)
        return self.module.record

    def example(self) -> dict[str, Any]:
        """Of images there is none."""
        return {}
