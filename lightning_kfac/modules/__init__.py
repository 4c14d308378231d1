"""LightningModules."""

from lightning_kfac.modules.causal_lm import CausalLM, Training

__all__ = ["CausalLM", "Training"]
