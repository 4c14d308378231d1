"""The passes of a collection, and what its factors say of where they come from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_kfac.data.datamodule import CORPUS, TextData, domain_text
from lightning_kfac.errors import InputError
from lightning_kfac.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Pass:
    """One reading of one text.

    Attributes:
        text: ``corpus`` or the name of a domain.
        layers: Those whose sums fit into memory at once.
        moments: Measure in the bases of the factors instead of summing factors.
    """

    text: str
    layers: tuple[str, ...]
    moments: bool

    @property
    def data_name(self) -> str:
        """What ``TextData`` calls the text."""
        return data_name(self.text)


def data_name(text: str) -> str:
    """What ``TextData`` calls the corpus, or a domain of this name."""
    return CORPUS if text == CORPUS else domain_text(text)


def all_passes(
    layers: Sequence[Sequence[str]], texts: Sequence[str], domains: Collection[str], moments: bool
) -> list[Pass]:
    """Factors of every text, then moments in their bases.

    Args:
        layers: What fits into memory at once, each a pass over each text.
        texts: Whose factors are to be collected.
        domains: Whose moments are measured beside those of the corpus.
        moments: Whether any are.
    """
    factors = [Pass(text, tuple(names), False) for text in texts for names in layers]
    return factors + [Pass(t, tuple(names), True) for t in [CORPUS, *domains] * moments for names in layers]


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
