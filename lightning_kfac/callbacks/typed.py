"""What Lightning hands to a callback, with its type: it knows base classes, and attaches some parts without any."""

from typing import TYPE_CHECKING, TypeVar

from lightning import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from lightning_kfac.modules.causal_lm import CausalLM

Kind = TypeVar("Kind", bound=Callback)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks in the order of their work."""
    return trainer.callbacks  # type: ignore[attr-defined]  # a connector of Lightning's sets it


def find_callback(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The Trainer's first callback of a kind."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def data_module(trainer: Trainer) -> object:
    """The data module of any task, or None where the Trainer was given plain loaders."""
    return trainer.datamodule  # type: ignore[attr-defined]  # a connector of Lightning's sets it


def causal_lm(pl_module: LightningModule) -> "CausalLM":
    """The LightningModule of a run of language modelling."""
    return pl_module  # type: ignore[return-value]  # Lightning's hooks say the base class
