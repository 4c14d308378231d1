"""Where tokens are read, a model is one of the transformers package; everything else takes any module."""

from typing import TYPE_CHECKING, cast

from torch import nn

from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NEEDED = ("config", "base_model", "get_input_embeddings", "get_output_embeddings")


def language_model(model: nn.Module) -> "PreTrainedModel":
    """The same model as one of the transformers package, or as a wrapper that answers like one.

    Of a wrapper such as peft's it is the model inside, in which an adapter of the weights stays active.

    Raises:
        InputError: It does not.
    """
    model = without_wrapper(model)
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


def without_wrapper(model: nn.Module) -> nn.Module:
    """The causal language model in a wrapper such as peft's, whose adapter stays active in it; others as they are.

    Raises:
        InputError: The adapter acts outside of the model, on its prompt.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    settings = getattr(model, "peft_config", None)
    if isinstance(settings, dict) and any(getattr(one, "is_prompt_learning", False) for one in settings.values()):
        raise InputError(
            "the model's adapter changes the prompt, not the weights: such a model cannot be measured here"
        )
    for name in ("get_base_model", "base_model"):
        inner = getattr(model, name, None)
        inner = inner() if name == "get_base_model" and callable(inner) else inner
        if isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None:
            return inner
    return model


def check_no_adapter(model: nn.Module) -> None:
    """Raises ``InputError`` for a model whose layers an adapter wraps: their weights are not those that run."""
    wrapped = without_wrapper(model) is not model
    inside = next((n for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")), None)
    if wrapped or inside is not None:
        raise InputError(
            f"the model carries an adapter{f' ({inside})' if inside else ''}, so that its layers' weights are not what "
            "runs: merge it first, model = model.merge_and_unload()"
        )
