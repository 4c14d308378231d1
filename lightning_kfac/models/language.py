"""Where tokens are read, a model is one of the transformers package; everything else takes any module."""

from typing import TYPE_CHECKING, cast

from torch import nn

from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NEEDED = ("config", "base_model", "get_input_embeddings", "get_output_embeddings")


def language_model(model: nn.Module) -> "PreTrainedModel":
    """The same model as one of the transformers package, or as a wrapper that answers like one.

    Raises:
        InputError: It does not.
    """
    if missing := [name for name in NEEDED if not hasattr(model, name)]:
        raise InputError(f"{type(model).__name__} is not a language model of transformers: it has no {missing[0]}")
    return cast("PreTrainedModel", model)  # wrappers are of no common class


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens the model knows: rows of its input embedding."""
    return language_model(model).get_input_embeddings().get_parameter("weight").shape[0]


def most_positions(config: "PretrainedConfig") -> int | None:
    """Longest row that a text model takes; None where its config names no limit."""
    most = getattr(config, "max_position_embeddings", None)
    return most if most is not None and most > 0 else None  # XLNet says -1
