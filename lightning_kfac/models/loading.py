"""Language models from the hub, from a folder, from a config, or the embedded demo."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from lightning_kfac.console import say
from lightning_kfac.errors import InputError, cause, first_line
from lightning_kfac.models.adapters import adapter_advice, check_adapter, merge_adapter
from lightning_kfac.models.dtypes import Dtype, mark_stored_dtype
from lightning_kfac.models.language import language_model
from lightning_kfac.models.model_folder import check_model_folder, inside
from lightning_kfac.models.sizes import check_sizes
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.stored import (
    check_amount,
    check_shapes,
    check_unpacked,
    declared_dtype,
    has_tokenizer,
    headers,
    stored_folder,
    stored_tensors,
    weight_files,
)
from lightning_kfac.models.tokenizer_identity import own_or_same
from lightning_kfac.storage.hub import check_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_PACKAGES = ("gguf", "accelerate")


def load_config(
    model_name: str | ModelSource | None,
    architecture: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> PretrainedConfig:
    """The configuration of a causal language model; of a local folder also checks what the weights' headers say.

    Args:
        model_name, architecture, trust_remote_code, revision, gguf_file: As for ``load_model``.

    Raises:
        InputError: No such model, no causal language model, damaged or missing weights, or quantized ones.
    """
    if model_name is None and architecture is not None:
        return _described_config(architecture)
    if model_name is not None and architecture is None:
        return _stored_config(ModelSource.named(model_name, revision, gguf_file, None, trust_remote_code))
    raise InputError("model: give either model_name (hub name or folder) or architecture (a config), not both")


def _described_config(architecture: Mapping[str, Any]) -> PretrainedConfig:
    settings = dict(architecture)
    check_sizes(settings, "model.architecture")
    try:
        return AutoConfig.for_model(settings.pop("model_type", "missing"), **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.architecture: {first_line(error)}") from None


def _stored_config(source: ModelSource) -> PretrainedConfig:
    if source.adapter is not None:
        check_adapter(source.adapter)
    tensors = _check_folder(source) if source.path.is_dir() else {}
    if source.path.is_file():
        raise InputError(f"{source}: a file, not a model folder{_of_file(source.path)}")
    if not source.path.exists() and _is_path(source.name):
        raise InputError(f"{source}: no such folder")
    if not source.path.exists():
        check_reachable("model", source.name)
    with _one_sentence(f"model {source}"):
        try:
            check_sizes(_written_config(source), f"model {source}")
            config = AutoConfig.from_pretrained(**_where(source))
        except OSError as error:
            raise InputError(f"model {source}: {_adapter_on_hub(source) or first_line(error)}") from error
    if source.gguf_file is None:
        check_unpacked(source, config, tensors)
    _check_causal(source, config)
    return config


def _written_config(source: ModelSource) -> dict[str, Any]:
    """The config as it is written, before a class makes more of it."""
    where = {key: value for key, value in _where(source).items() if key != "trust_remote_code"}
    return PretrainedConfig.get_config_dict(**where)[0]


def _check_folder(source: ModelSource) -> Any:
    """What a local folder's weights are, if it holds a model."""
    path = source.path
    check_model_folder(path)
    if source.gguf_file is not None:
        if not inside(path, source.gguf_file).is_file():
            raise InputError(f"model.gguf_file {source.gguf_file}: no such file in {path}")
        return {}
    if advice := adapter_advice(path, source.name):
        raise InputError(advice)
    if not (path / "config.json").is_file():
        gguf = next(path.glob("*.gguf"), None)
        hint = f"; it has {gguf.name}: name it with model.gguf_file" if gguf else ""
        raise InputError(f"{path}: not a Hugging Face model folder: it has no config.json{hint}")
    return headers(weight_files(path))


def _of_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f": set model.model_name to {path.parent} and model.gguf_file to {path.name}"
    return f": name the folder that holds config.json and the weights, such as {path.parent}"


def _adapter_on_hub(source: ModelSource) -> str | None:
    """The advice for an adapter's repository, which has no config.json."""
    from transformers.utils import cached_file

    found = None
    if not source.path.exists():
        try:
            found = cached_file(source.name, "adapter_config.json", revision=source.revision)
        except OSError:
            return None
    return adapter_advice(Path(found).parent, str(source)) if found else None


def _check_causal(source: ModelSource, config: PretrainedConfig) -> None:
    """Raises ``InputError`` for a model that does not predict each next token from those before it."""
    kind = type(config)
    remote = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote:
        return
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model {source}: {config.model_type} is no causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model {source}: an encoder with a decoder ({config.model_type}), no causal language model")
    one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not one_way:
        raise InputError(f"model {source}: an encoder ({config.model_type}): its tokens see those after them")


def load_model(
    model_name: str | ModelSource | None,
    dtype: Dtype = "auto",
    *,
    architecture: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
    adapter: str | None = None,
) -> "PreTrainedModel":
    """A causal language model in eval mode, on the CPU.

    Args:
        model_name: Hub name, local folder, or ``demo``; ``NAME@REVISION`` is short for a hub name with its revision.
        dtype: ``auto`` is the checkpoint's own, except that float16 is computed in float32 (its gradients overflow,
            on every device); an edit is written in the checkpoint's own all the same. A dtype that is named is
            computed and written.
        architecture: Instead of a name: a config with ``model_type``; weights are then random.
        trust_remote_code: Let the model's repository run its own code.
        revision: Branch, tag or commit of a hub repository.
        gguf_file: Name of a GGUF file in the folder or repository; its weights are dequantized.
        adapter: Folder or hub name of an adapter (peft) to merge into the weights.

    Raises:
        InputError: No such model, no weights, or weights that do not match the config.

    Example:
        >>> load_model("demo").dtype
        torch.float32
    """
    if model_name is None:
        config = load_config(None, architecture)
        _check_room(config)
        return AutoModelForCausalLM.from_config(
            config, dtype=config.dtype if dtype == "auto" else getattr(torch, dtype)
        ).eval()
    source = ModelSource.named(model_name, revision, gguf_file, adapter, trust_remote_code)
    config = load_config(source, architecture)
    if not trust_remote_code:
        check_stored(source, config)
    declared = None if source.gguf_file else declared_dtype(config, stored_tensors(source))
    stored = declared if dtype == "auto" else getattr(torch, dtype)
    model = _read(source, torch.float32 if stored == torch.float16 else stored)
    if source.adapter is not None:
        model = merge_adapter(model, source.adapter)
    mark_stored_dtype(model, stored or model.dtype)
    return model.eval()


def _read(source: ModelSource, dtype: torch.dtype | None) -> "PreTrainedModel":
    """The weights of a source."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # nobody else is asked to convert .bin files
    if source.gguf_file is not None:
        return _dequantized(source, dtype)
    with _one_sentence(f"model {source}"):
        try:
            # weights_only, which is transformers' default, keeps .bin files from running code.
            loaded = AutoModelForCausalLM.from_pretrained(
                **_where(source), dtype=dtype or "auto", weights_only=True, output_loading_info=True
            )
        except RuntimeError:
            check_shapes(source, skeleton(load_config(source), source.trust_remote_code), stored_tensors(source))
            raise
    # Asked for its loading info it gives a pair, which its annotation does not say.
    model, loading = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"model {source}: {len(missing)} weights are not in the checkpoint, first {missing[0]}")
    if unused := sorted(loading["unexpected_keys"]):
        say(
            f"note: {len(unused)} weights of {source} are not of the language model and play no part, first {unused[0]}"
        )
    return model


def _dequantized(source: ModelSource, dtype: torch.dtype | None) -> "PreTrainedModel":
    """The model of a GGUF file, as if it had never been quantized: it can be saved."""
    how: dict[str, Any] = {}
    with _one_sentence(f"model {source}, {source.gguf_file}"):
        try:
            from transformers import GgufConfig

            how["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:  # older versions always dequantize
            pass
        packed = AutoModelForCausalLM.from_pretrained(**_where(source), dtype=dtype or torch.float32, **how)
        config = type(packed.config).from_dict(
            {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
        model.load_state_dict(packed.state_dict())
        model.tie_weights()
        model.generation_config = packed.generation_config
    return model


def check_stored(source: ModelSource, config: PretrainedConfig) -> None:
    """Compares stored weights with their config, before memory is taken for what it describes.

    Raises:
        InputError: A tensor has another shape, or the config describes far more than the files hold.
    """
    folder = stored_folder(source)
    if folder is not None and source.gguf_file is None:
        model = skeleton(config, source.trust_remote_code)
        check_shapes(source, model, stored_tensors(source))
        check_amount(source, model, folder)


def _check_room(config: PretrainedConfig) -> None:
    """Raises ``InputError`` where a model without stored weights is larger than this machine's memory."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in skeleton(config).parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"model.architecture: its weights take {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB"
        )


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model's modules without memory for weights (meta device): names and shapes only.

    Raises:
        InputError: No model can be built from the config.
    """
    with _one_sentence(f"model {config.name_or_path or config.model_type}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str | ModelSource,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    own_tokenizer: bool | None = None,
) -> "PreTrainedTokenizerBase":
    """A tokenizer from a hub name, a folder, or ``demo``.

    Args:
        name: Also ``NAME@REVISION``, or a model's source.
        trust_remote_code: Let the repository run its own code.
        revision: Branch, tag or commit of a hub repository.
        gguf_file: Name of a GGUF file in the folder or repository that holds the tokenizer.
        own_tokenizer: Where transformers builds one that makes other ids than its ``tokenizer.json``: True takes the
            file's own, False the one that was built; by default that is an error.

    Raises:
        InputError: There is none, it cannot be read, or it makes other ids than its file.
    """
    source = ModelSource.named(name, revision, gguf_file, None, trust_remote_code)
    try:
        with _one_sentence(f"tokenizer {source}"):
            if source.path.is_dir():
                check_model_folder(source.path)
            if source.gguf_file is None and source.path.is_dir() and not has_tokenizer(source.path):
                raise InputError(f"tokenizer {source}: the folder has none")
            tokenizer = AutoTokenizer.from_pretrained(**_where(source))
    except InputError as error:
        raise InputError(f"{error} (data.tokenizer names another)", "data.tokenizer") from error
    if source.gguf_file is not None:
        return tokenizer
    return own_or_same(tokenizer, str(source.path), own_tokenizer, revision=source.revision)


def end_of_text_ids(model: nn.Module) -> frozenset[int]:
    """Every id that ends a text for this model."""
    for config in (getattr(model, "generation_config", None), language_model(model).config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _where(source: ModelSource) -> dict[str, Any]:
    """What ``from_pretrained`` is told of a source.

    Raises:
        InputError: A package that it needs is not installed.
    """
    found: dict[str, Any] = {
        "pretrained_model_name_or_path": str(source.path),
        "trust_remote_code": source.trust_remote_code,
    }
    if source.revision is not None:
        found["revision"] = source.revision
    if source.gguf_file is not None:
        if missing := [name for name in GGUF_PACKAGES if find_spec(name) is None]:
            raise InputError(f"model.gguf_file: needs {missing[0]}: pip install 'lightning-kfac[gguf]'")
        found["gguf_file"] = source.gguf_file
    return found


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turns whatever transformers, the hub, safetensors or a model's own code raise into one line with the cause."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """Why something cannot be loaded, and what to do about it where that is known."""
    if isinstance(error, UnpicklingError):
        return "its .bin file holds more than tensors, which could run code; convert it to safetensors where it is from"
    said = cause(error)
    if "trust_remote_code" in said or "custom code" in said:
        return "it comes with code of its own, which runs only where trust_remote_code is set"
    return said


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).suffix == ".safetensors"
