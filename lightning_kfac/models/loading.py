"""Language models from the hub, from a folder, from a config, or the embedded demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from lightning_kfac.assets import resolve_path
from lightning_kfac.errors import InputError, first_line
from lightning_kfac.models.dtypes import Dtype
from lightning_kfac.models.language import language_model
from lightning_kfac.models.tokenizer_identity import own_or_same

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_config(
    model_name: str | None, architecture: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's configuration; checks that a local folder holds one and has weights beside it."""
    if model_name is None and architecture is not None:
        return _described_config(architecture)
    if model_name is not None and architecture is None:
        return _stored_config(model_name, trust_remote_code)
    raise InputError("model: give either model_name (hub name or folder) or architecture (a config), not both")


def _described_config(architecture: Mapping[str, Any]) -> PretrainedConfig:
    settings = dict(architecture)
    try:
        return AutoConfig.for_model(settings.pop("model_type", "missing"), **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.architecture: {first_line(error)}") from None


def _stored_config(model_name: str, trust_remote_code: bool) -> PretrainedConfig:
    path = resolve_path(model_name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: not a Hugging Face model folder: it has no config.json")
        _check_weights(path)
    elif _is_path(model_name):
        raise InputError(f"{model_name}: no such folder")
    try:
        return AutoConfig.from_pretrained(_name(model_name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model {model_name}: {first_line(error)}") from None


def load_model(
    model_name: str | None,
    dtype: Dtype = "auto",
    *,
    architecture: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """A causal language model in eval mode, on the CPU.

    Args:
        model_name: Hub name, local folder, or ``demo``.
        dtype: ``auto`` is the checkpoint's own, except that float16 becomes float32 (its gradients
            overflow).
        architecture: Instead of a name: a config with ``model_type``; weights are then random.

    Raises:
        InputError: No such model, no weights, or weights that do not match the config.
    """
    config = load_config(model_name, architecture, trust_remote_code)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and config.dtype == torch.float16:
        torch_dtype = torch.float32
    if model_name is None:
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else torch_dtype).eval()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            _name(model_name),
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model {model_name}: {first_line(error)}") from error
    # Asked for its loading info it gives a pair, which its annotation does not say.
    model, loading = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"model {model_name}: {len(missing)} weights are not in the checkpoint, first {missing[0]}")
    return model.eval()


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model's modules without memory for weights (meta device): names and shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, trust_remote_code: bool = False, own_tokenizer: bool | None = None
) -> "PreTrainedTokenizerBase":
    """A tokenizer from a hub name, a folder, or ``demo``.

    Args:
        own_tokenizer: Where transformers builds one that makes other ids than its ``tokenizer.json``: True takes the
            file's own, False the one that was built; by default that is an error.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_name(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"tokenizer {name}: {first_line(error)} (data.tokenizer names another)", "data.tokenizer"
        ) from None
    return own_or_same(tokenizer, _name(name), own_tokenizer)


def end_of_text_ids(model: nn.Module) -> frozenset[int]:
    """Every id that ends a text for this model."""
    for config in (getattr(model, "generation_config", None), language_model(model).config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _check_weights(folder: Path) -> None:
    """Reads the headers of a folder's weight files, which also tells whether they are whole."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: the model folder has no weights (*.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: damaged or incomplete: {first_line(error)}") from None


def _name(name: str) -> str:
    return str(resolve_path(name))


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).suffix == ".safetensors"
