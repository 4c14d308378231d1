"""What a collection is of, as ``metadata.json`` says it, and the settings under which it would be wrong."""

from collections.abc import Collection
from typing import Any

from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_kfac.callbacks.collection.task import UNKNOWN_TEXT, TaskModule, TextsInTurn
from lightning_kfac.callbacks.typed import data_module
from lightning_kfac.data.names import CORPUS
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import NAMELESS


def check_settings(trainer: Trainer, task: TaskModule) -> None:
    """Raises ``InputError`` for settings of a run under which factors would be wrong."""
    if not task.frozen:
        raise InputError("CurvatureCollector needs a frozen model: leave model.training out")
    if trainer.accumulate_grad_batches != 1:
        raise InputError("trainer.accumulate_grad_batches must be 1: Lightning would divide the loss by it")
    if trainer.max_epochs != 1:
        raise InputError("trainer.max_epochs must be 1: set data.max_tokens to collect on more or less text")
    plugin = trainer.precision_plugin
    scaled = not (isinstance(plugin, MixedPrecision) and plugin.scaler is None)
    if plugin.precision in ("16-true", "16-mixed") and scaled:
        raise InputError(
            f"trainer.precision {plugin.precision}: float16 gradients overflow, and scaling the loss scales G by "
            "its square; use bf16-mixed, bf16-true or 32-true"
        )


def collection_metadata(trainer: Trainer, task: TaskModule, layers: Collection[str]) -> dict[str, Any]:
    """What factors say of where they come from, but for the number of tokens."""
    data = data_module(trainer)
    precision = str(next(task.model.parameters()).dtype).removeprefix("torch.")
    if isinstance(trainer.precision_plugin, MixedPrecision):
        precision += f" ({trainer.precision_plugin.precision})"
    objective = task.about()
    return {
        "model": task.model_name or NAMELESS,
        "fingerprint": weights_fingerprint(task.model, layers),
        **(data.about(CORPUS) if isinstance(data, TextsInTurn) else UNKNOWN_TEXT),
        "labels": objective.pop("labels", None),
        "mc_samples": task.objective.mc_samples,
        "precision": precision,
        **objective,
        "world_size": trainer.world_size,
    }


def domain_metadata(data: object, name: str) -> dict[str, Any]:
    """Where the factors of a domain differ; raises ``InputError`` for a data module that cannot turn to it."""
    if not isinstance(data, TextsInTurn):
        raise InputError(f"domain {name}: {type(data).__name__} does not give one text after the other")
    about = data.about(name)
    return {key: about[key] for key in ("corpus", "text", "max_tokens", "n_documents")}
