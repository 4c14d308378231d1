"""LightningModules."""

from typing import TYPE_CHECKING

from lightning_kfac.lazy import lazy

if TYPE_CHECKING:
    from lightning_kfac.modules.causal_lm import CausalLM, Training
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "lightning_kfac.modules.causal_lm": ["CausalLM", "Training"],
        },
    )

__all__ = ["CausalLM", "Training"]
