"""What a collection is of, as ``metadata.json`` says it, and the settings under which it would be wrong."""

from collections.abc import Collection
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.modules.text_data import TextData


def check_settings(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises ``InputError`` for settings of a run under which factors would be wrong."""
    if not pl_module.frozen:
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


def collection_metadata(trainer: Trainer, pl_module: LightningModule, layers: Collection[str]) -> dict[str, Any]:
    """What factors say of where they come from, but for the number of tokens."""
    data, precision = trainer.datamodule, str(next(pl_module.model.parameters()).dtype).removeprefix("torch.")
    if isinstance(trainer.precision_plugin, MixedPrecision):
        precision += f" ({trainer.precision_plugin.precision})"
    return {
        "model": pl_module.model_name or "random weights",
        "fingerprint": weights_fingerprint(pl_module.model, layers),
        "tokenizer": getattr(data, "tokenizer_name", None),
        "corpus": data.corpus.label if isinstance(data, TextData) else None,
        "text": data.corpus.identity() if isinstance(data, TextData) else None,
        "max_tokens": getattr(data, "max_tokens", None),
        "seq_len": getattr(data, "seq_len", None),
        "labels": pl_module.labels,
        "mc_samples": pl_module.fisher_loss.mc_samples,
        "precision": precision,
        "seed": pl_module.seed,
        "world_size": trainer.world_size,
    }


def domain_metadata(data: TextData, name: str) -> dict[str, Any]:
    """Where the factors of a domain differ."""
    corpus = data.domains[name]
    return {"corpus": corpus.label, "text": corpus.identity(), "max_tokens": data.domain_tokens}
