"""The weight files of a stored model: which they are, and what their headers say, before a weight is read."""

import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from lightning_kfac.errors import InputError, first_line
from lightning_kfac.models.source import ModelSource
from lightning_kfac.storage.json_files import file_name

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = ".index.json"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "special_tokens_map.json")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Parameters that any machine has room for; of a model of so many transformers says which weights are missing.
FEW = 1 << 28
# Names of packed weights: GPTQ and AWQ, compressed-tensors, MXFP4; a plain weight is packed if it is no FLOAT.
PACKED = (".qweight", "_packed", "_blocks", ".weight")


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        file: Where it is.
        dtype: As safetensors writes it: ``F16``.
        shape: Of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in the order in which transformers looks for them.

    Raises:
        InputError: There are none, or a shard is missing.
    """
    for name in (SAFETENSORS, BIN):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX)).is_file():
            return _shards(folder / (name + INDEX))
    if others := sorted(folder.glob("*.safetensors")):
        return others
    raise InputError(f"{folder}: the model folder has no weights ({SAFETENSORS} or {BIN}){_instead(folder)}")


def _shards(index: Path) -> list[Path]:
    try:
        contents = json.loads(index.read_text("utf-8"))
        names = sorted({file_name(name) for name in contents["weight_map"].values()})
        if not names or "metadata" not in contents:
            raise ValueError("it names no files, or has no metadata")
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: damaged or incomplete: {first_line(error)}; fetch the model again") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{index.parent}: {len(missing)} of {len(files)} files of weights are missing, first {missing[0]}; fetch "
            "the model again"
        )
    return files


def _instead(folder: Path) -> str:
    """What a folder without weights holds that could be meant."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"; it has {ggufs[0].name}: name it with model.gguf_file"
    others = sorted(
        file.name for kind in ("*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack") for file in folder.glob(kind)
    )
    return f"; {others[0]} must be converted first (save_pretrained of transformers)" if others else ""


def headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """What safetensors files hold, by name; of other files only whether they are whole.

    Raises:
        InputError: A file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            if file.suffix != ".safetensors":
                _check_pickle(file)
                continue
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{file}: damaged or incomplete: {first_line(error)}; fetch the model again") from None
    return found


def _check_pickle(file: Path) -> None:
    """Files since torch 1.6 are zip archives, whose directory is at their end."""
    with open(file, "rb") as opened:
        begin = opened.read(2)
    if begin == b"PK" and not zipfile.is_zipfile(file):
        raise ValueError("the file ends early")
    if begin[:1] not in (b"P", b"\x80"):
        raise ValueError("not a file of torch.save")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds any file of a tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in TOKENIZER)


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """The safetensors that a plain source's weights lie in, by name; empty where they lie elsewhere or not here."""
    folder = stored_folder(source)
    if folder is None or not source.is_plain:
        return {}
    try:
        return headers(weight_files(folder))
    except InputError:
        return {}


def stored_folder(source: ModelSource) -> Path | None:
    """The folder that a model lies in; of a hub model the snapshot in the cache, if there is one."""
    if source.path.is_dir():
        return source.path
    try:
        found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    except ValueError:  # not a name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def declared_dtype(config: PretrainedConfig, tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The dtype that a checkpoint says it is in: the config's, otherwise that of most of its numbers."""
    declared = config.dtype or config.get_text_config().dtype
    if declared is not None:
        return getattr(torch, declared) if isinstance(declared, str) else declared
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            numbers[tensor.dtype] += torch.Size(tensor.shape).numel()
    return FLOATS[numbers.most_common(1)[0][0]] if numbers else None


def check_unpacked(source: object, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ``InputError`` for quantized weights, which are no matrices to track or edit."""
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if settings:
        about = settings if isinstance(settings, dict) else vars(settings)
        method = about.get("quant_method") or about.get("quant_algo") or "unknown method"
        raise InputError(f"model {source}: its weights are quantized ({getattr(method, 'value', method)}); {UNPACK}")
    packed = [n for n, t in tensors.items() if n.endswith(PACKED) and len(t.shape) > 1 and t.dtype not in FLOATS]
    if packed:
        raise InputError(
            f"model {source}: its weights are packed ({packed[0]} is {tensors[packed[0]].dtype}); {UNPACK}"
        )


UNPACK = (
    "neither curvature nor an edit is possible on packed numbers: name the unquantized model, or dequantize it first"
)


def check_shapes(source: object, model: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ``InputError`` where a stored tensor has another shape than the config says.

    Args:
        model: Built from the config, without memory for weights.
    """
    for name, expected in model.state_dict().items():
        found = tensors.get(name)
        if found is not None and found.shape != tuple(expected.shape):
            raise InputError(
                f"model {source}: {name} is {list(found.shape)} in its file, {list(expected.shape)} by config.json"
            )


def check_amount(source: object, model: nn.Module, folder: Path) -> None:
    """Raises ``InputError`` where a model has more parameters than its files have bytes: they are not its files.

    Args:
        model: Built from the config, without memory for weights.
        folder: Of the files.
    """
    try:
        n_bytes = sum(file.stat().st_size for file in weight_files(folder))
    except InputError:  # of a hub model the weights may not be fetched yet
        return
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > max(n_bytes, FEW):
        raise InputError(
            f"model {source}: config.json describes {count:,} parameters, its files of weights have {n_bytes:,} bytes"
        )
