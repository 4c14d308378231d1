"""Loading models and tokenizers by hub name, folder, or ``demo``."""

from lightning_kfac.models.loading import Dtype, load_config, load_model, load_tokenizer

__all__ = ["Dtype", "load_config", "load_model", "load_tokenizer"]
