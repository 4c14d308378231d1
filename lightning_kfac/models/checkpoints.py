"""Writing models as Hugging Face checkpoints: what came in goes out, but for the layers that changed."""

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import full_state, is_sharded, whole
from lightning_kfac.models.dtypes import stored_dtype
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.stored import (
    FLOATS,
    INDEX,
    SAFETENSORS,
    StoredTensor,
    declared_dtype,
    has_tokenizer,
    stored_folder,
    stored_tensors,
)
from lightning_kfac.storage.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What lies beside weights and belongs to the model: configs of generation, tokenizer and processors, chat templates,
# vocabularies, the code that config.json names, licences. The model card (README.md) describes the unedited model
# and its measurements; it is not carried along.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICEN[CS]E*", "NOTICE*", "*USE_POLICY*")
SIDE_FOLDERS = ("chat_templates", "additional_chat_templates")
# Of training runs, of adapters, of other edits.
NOT_CARRIED = (
    "adapter_config.json", "all_results.json", "edit.json", "eval_results.json", "restored.json", "train_results.json",
    "trainer_state.json",
)  # fmt: skip
CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")


def save_checkpoint(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
    *,
    source: ModelSource | None = None,
    changed: Collection[str] | None = None,
    like: ModelSource | None = None,
) -> None:
    """Writes config, safetensors and tokenizer to ``path``; the folder appears when it is complete.

    Where the source is a checkpoint of safetensors in the model's dtype, its very files are written again with other
    values in the layers that changed: every other bit, shard and name stays, also of weights that the language model
    does not use. Otherwise (a ``.bin`` or GGUF file, a merged adapter, another dtype) transformers writes the model.
    In both cases the source's other files come along (``SIDE_FILES``).

    Of a sharded model all ranks must call it; rank 0 writes.

    Args:
        tokenizer: Saved beside the model where the source has none of its own.
        dtype: Cast the stored weights; the model itself keeps its own, also by its config. By default the dtype of the
            checkpoint.
        extra: Further text files, name to contents.
        source: What the model was read from, as far as it is known.
        changed: Names of the layers that no longer are as in the source; None where that is not known.
        like: The changed layers take their dtype from the files of this source instead.
    """
    known: dict[str, StoredTensor] = {}
    if source is not None and dtype is None and changed is not None:
        known = _own_files(model, source)
    parameters = {} if changed is None else _parameters(model, changed)
    in_place = bool(known) and set(_names(model, parameters, known)) <= set(known)
    if is_sharded(model):  # the first rank's files decide: others may not see them
        in_place = current_ranks().gather(in_place)[0]
    state = {name: whole(p) for name, p in parameters.items()} if in_place else full_state(model)
    if is_sharded(model) and current_ranks().rank:
        return
    folder = None if source is None else _with_side_files(source)
    with new_folder(path) as partial:
        if in_place:
            targets = known if like is None else {**known, **stored_tensors(like)}
            replaced = _as_in_files(model, state, targets, stored_dtype(model) if like is None else None)
            _write_again(known, replaced, partial)
        else:
            _write_anew(model, state, partial, dtype or stored_dtype(model))
            _declare(partial / CONFIG, stored_dtype(model))
        if folder is not None:
            _carry(folder, partial, with_config=in_place)
        if tokenizer is not None and not has_tokenizer(partial):
            tokenizer.save_pretrained(partial)
        for name, contents in (extra or {}).items():
            (partial / name).write_text(contents, "utf-8")


def _own_files(model: nn.Module, source: ModelSource) -> dict[str, StoredTensor]:
    """The tensors of the source's files, if the model is written in the dtype that they are declared in."""
    known = stored_tensors(source)
    config = _config_beside(source)
    if not known or config is None or declared_dtype(config, known) != stored_dtype(model):
        return {}
    return known


def _config_beside(source: ModelSource) -> PretrainedConfig | None:
    folder = stored_folder(source)
    if folder is None:
        return None
    with suppress(Exception):  # it was read when the model was loaded; what is gone since cannot be written again
        return AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    return None


def _parameters(model: nn.Module, layers: Collection[str]) -> dict[str, Tensor]:
    """The parameters that hold some layers, by name."""
    found = find_layers(model)
    return {found[name].parameter_name: found[name].parameter.detach() for name in layers}


def _names(model: nn.Module, parameters: Mapping[str, Tensor], known: Mapping[str, StoredTensor]) -> list[str]:
    """The names of parameters in the files; empty names stand for those whose shape differs there."""
    meta = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    named = _as_named_in_files(model, meta, known)
    return [n if n in known and known[n].shape == tuple(tensor.shape) else "" for n, tensor in named.items()]


def _as_named_in_files(
    model: nn.Module, state: dict[str, Tensor], known: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """Parameters as the checkpoint has them: transformers renames, joins and splits some when it loads them."""
    from transformers.core_model_loading import revert_weight_conversion

    whole_model = language_model(model)
    prefix = f"{whole_model.base_model_prefix}."  # which files of the decoder alone, as of GPT-2, do not have
    found = {}
    for name, value in revert_weight_conversion(whole_model, state).items():
        found[name if name in known else name.removeprefix(prefix)] = value
    return found


def _as_in_files(
    model: nn.Module, state: dict[str, Tensor], known: Mapping[str, StoredTensor], declared: torch.dtype | None
) -> dict[str, Tensor]:
    """Tensors by their names in the files, in the wider of the file's and the declared dtype, so that none is rounded.

    Args:
        declared: None takes the file's dtype alone: of weights that came from it.
    """
    found = {}
    for name, value in _as_named_in_files(model, state, known).items():
        own = FLOATS[known[name].dtype]
        dtype = own if declared is None else torch.promote_types(own, declared)
        found[name] = value.to("cpu", dtype).contiguous()
    return found


def _write_again(known: Mapping[str, StoredTensor], replaced: Mapping[str, Tensor], folder: Path) -> None:
    """Copies weight files, one at a time, with some tensors replaced."""
    for file in sorted({tensor.file for tensor in known.values()}):
        inside = {name: replaced[name] for name in replaced if known[name].file == file}
        if not inside:
            shutil.copyfile(file, folder / file.name)
            continue
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            contents = {name: inside[name] if name in inside else opened.get_tensor(name) for name in names}
            save_file(contents, folder / file.name, metadata=opened.metadata())
    index = file.parent / (SAFETENSORS + INDEX)
    if index.is_file():
        shutil.copyfile(index, folder / index.name)


def _write_anew(model: nn.Module, state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """``save_pretrained`` in a dtype."""
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    whole_model = language_model(model)
    settings = getattr(whole_model, "generation_config", None)  # a classifier of images has none
    if settings is not None:  # published ones may hold what transformers reads and does not write
        whole_model.generation_config = GenerationConfig()
    try:
        whole_model.save_pretrained(folder, state_dict=state)
    finally:
        if settings is not None:
            whole_model.generation_config = settings
    if settings is not None:
        (folder / "generation_config.json").write_text(settings.to_json_string(), "utf-8")


def _declare(file: Path, dtype: torch.dtype) -> None:
    """Writes into config.json the dtype that the model is loaded in, of each of its parts."""
    config = json.loads(file.read_text("utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part |= {key: str(dtype).removeprefix("torch.") for key in DTYPE_KEYS if key in part}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _with_side_files(source: ModelSource) -> Path | None:
    """The source's folder; of a hub model, with those files that loading it did not fetch."""
    if source.gguf_file is not None:  # config and tokenizer are inside the file
        return None
    if not source.path.is_dir():
        import huggingface_hub

        patterns = [*SIDE_FILES, *(f"{folder}/*" for folder in SIDE_FOLDERS)]
        with suppress(Exception):  # without a network, what is in the cache must do
            return Path(
                huggingface_hub.snapshot_download(source.name, revision=source.revision, allow_patterns=patterns)
            )
    return stored_folder(source)


def _carry(folder: Path, target: Path, with_config: bool) -> None:
    """Copies what belongs to a model beside its weights.

    Args:
        with_config: Also config.json; otherwise the one that is there stays.
    """
    for file in sorted({file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()}):
        skipped = file.name in NOT_CARRIED or file.name.endswith(INDEX) or (file.name == CONFIG and not with_config)
        if not skipped and (file.suffix != ".py" or _has_code(folder)):
            shutil.copyfile(file, target / file.name)
    for name in SIDE_FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name, dirs_exist_ok=True)


def _has_code(folder: Path) -> bool:
    """Whether a config names code in the folder."""
    return any('"auto_map"' in file.read_text("utf-8", errors="replace") for file in folder.glob("*config.json"))
