"""Of the image task what ``preflight`` is of language modelling: checks before anything expensive, and what is said."""

from collections.abc import Mapping
from pathlib import Path

from lightning import Trainer

from lightning_kfac.callbacks import CurvatureCollector, EditCallback
from lightning_kfac.callbacks.typed import find_callback
from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.targets import count_blocks, narrow
from lightning_kfac.modules.image_classifier import ImageClassifier
from lightning_kfac.modules.image_data import ImageData


def check_fit(trainer: Trainer, model: ImageClassifier, data: ImageData) -> Mapping[str, Layer]:
    """The layers that the collection will track.

    Raises:
        InputError: The settings of two parts do not go together, or not with this model.
    """
    collector = find_callback(trainer, CurvatureCollector)
    edit = find_callback(trainer, EditCallback)
    if collector is None:
        raise InputError("crystallize studies the attention of language models; leave it out for images")
    collector.check(trainer, model)
    classifier = model.new_model()
    targets = collector.targets(classifier)
    if edit is not None:
        chosen = narrow(list(targets), count_blocks(classifier), edit.config.blocks, edit.config.projections)
        edit.check(chosen, [], collector)
    return targets


def inputs(model: ImageClassifier, data: ImageData) -> list[Path]:
    """Paths that a run reads."""
    return [] if model.model_name is None else [Path(model.model_name)]


def announce(folder: Path, trainer: Trainer, model: ImageClassifier, data: ImageData, n_layers: int) -> None:
    """Prints the steps of the run in order."""
    edit = find_callback(trainer, EditCallback)
    steps = [
        f"collect the curvature of {n_layers} layers, positions: {model.positions}",
        f"evaluate {data.n_wrong} wrong-labelled training images and {data.n_validation} that no training saw",
    ]
    if model.model_name is None:
        steps.insert(0, f"train a vision transformer on {len(data.training.pixels):,} images")
    if edit is not None:
        what = f"formula {edit.config.formula}, rho {edit.config.rho}"
        steps.append(f"edit it ({what}), save it and evaluate it again")
    console.print(f"{folder}: " + "; ".join(f"{i}. {step}" for i, step in enumerate(steps, start=1)))
