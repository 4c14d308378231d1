"""What a user asks to have planned: options over a config of ``fit`` over defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from transformers import PretrainedConfig

from lightning_kfac.errors import InputError
from lightning_kfac.models.choices import block_choice, projection_choice
from lightning_kfac.models.dtypes import Dtype
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.loading import load_config, skeleton
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.targets import MLP, PROJECTIONS, projection_of, resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import published_config, read_architecture
from lightning_kfac.planning.hardware import Hardware, find_hardware
from lightning_kfac.planning.run import Job
from lightning_kfac.planning.shapes import SHAPES
from lightning_kfac.storage.yaml_files import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What fit takes where nothing is said.
DEFAULTS = {"seq_len": 512, "batch_size": 8, "blocks": "all"}
# Options of a plan and where they stand in a config of fit.
PLACES = {
    "tokens": ("data", "max_tokens"),
    "seq_len": ("data", "seq_len"),
    "batch_size": ("data", "batch_size"),
    "blocks": ("collect", "blocks"),
    "projections": ("collect", "projections"),
    "modules": ("collect", "modules"),
    "coupled": ("collect", "coupled"),
    "dtype": ("model", "dtype"),
}
# Settings of such a config that change what a run takes and are not in the arithmetic.
NOT_PLANNED = (("model", "mc_samples"), ("collect", "moments"), ("collect", "shard_factors"), ("data", "domains"))
OVERRIDES = {"memory_gb": ("memory", 1e9), "peak_tflops": ("flops", 1e12), "link_gb": ("within", 1e9),
             "network_gb": ("between", 1e9), "efficiency": ("efficiency", 1)}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        title: The model as the user knows it.
        model, job: For the arithmetic.
        given: Settings of ``fit`` that differ from the config or the defaults, by their dotted names.
        notes: What the user should know about the choice of layers, and about what is left out.
    """

    title: str
    model: cost.Architecture
    job: Job
    given: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_request(options: Mapping[str, Any], config: Path | None = None) -> Request:
    """What the options of a plan ask for.

    Args:
        options: By the names in ``PLACES``, and ``model``, ``shape`` and ``trust_remote_code``; None where not given.
        config: A config of ``fit`` that they override.

    Raises:
        InputError: A value is of no use, or the model cannot be planned.
    """
    written = _written(config) if config else {}
    title, architecture, is_published = _model(options, written.get("model", {}))
    given = {name: options[name] for name in PLACES if options[name] is not None}
    settings = _settings(given, written)
    if is_published and settings["dtype"] in ("auto", None):
        settings["dtype"] = given["dtype"] = "bfloat16"  # the checkpoint was not asked, so the command has to say it
    _check(settings)
    module = _on_paper(title, architecture, options["trust_remote_code"])
    model = read_architecture(module)
    has_experts = any(product.copies > 1 for product in model.products)
    if settings["projections"] is None and has_experts:
        settings["projections"] = _of_mlp(module)
        if settings["modules"] is None:
            given["projections"] = settings["projections"]
    tracked = _tracked(module, model, settings)
    notes = _not_planned(written)
    if has_experts:
        notes = [*_about_experts(tracked, settings["tokens"]), *notes]
    job = _job(tracked, settings, architecture, written)
    dotted = {".".join(PLACES[name]): value for name, value in given.items()}
    dotted |= {f"model.{key}": options[key] for key in ("revision", "gguf_file") if options.get(key)}
    return Request(title, model, job, dotted, tuple(notes))


def _settings(given: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each option: as given, as in the config, or the default."""
    settings = {}
    for name, (section, key) in PLACES.items():
        value = given.get(name, written.get(section, {}).get(key))
        settings[name] = DEFAULTS.get(name) if value is None else value
    if isinstance(settings["blocks"], int | str):
        settings["blocks"] = block_choice(settings["blocks"])
    if isinstance(settings["projections"], str):
        settings["projections"] = projection_choice(settings["projections"])
    return settings


def _check(settings: Mapping[str, Any]) -> None:
    """Raises ``InputError`` for values of the wrong type: nobody has looked at those of a config."""
    for name in ("tokens", "seq_len", "batch_size"):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a number of at least 1, got {value!r}", name)
    for name in ("projections", "modules"):
        if not isinstance(settings[name], list | None):
            raise InputError(f"{name} must be a list, got {settings[name]!r}", name)
    if not isinstance(settings["coupled"], bool | None):
        raise InputError(f"coupled must be true or false, got {settings['coupled']!r}", "coupled")
    blocks = settings["blocks"]
    dtype = settings["dtype"]
    if blocks != "all" and not isinstance(blocks, list):
        raise InputError(f"blocks must be all or a list of block numbers, got {blocks!r}", "blocks")
    if dtype not in (*get_args(Dtype), None):
        raise InputError(f"model.dtype is {dtype!r}; choose {', '.join(get_args(Dtype))}")


def _on_paper(title: str, config: PretrainedConfig, trust_remote_code: bool) -> "PreTrainedModel":
    try:
        return skeleton(config, trust_remote_code)
    except Exception as error:
        raise InputError(f"{title}: no causal language model: {' '.join(str(error).split())[:200]}") from None


def _tracked(module: nn.Module, model: cost.Architecture, settings: Mapping[str, Any]) -> tuple[cost.Product, ...]:
    """The products of the layers that are chosen."""
    layers = resolve_targets(module, settings["blocks"], settings["projections"], settings["modules"])
    tracked = tuple(model.select(layers))
    if len(tracked) < len(layers):
        raise InputError("the head cannot be planned: leave it out of modules", "modules")
    return tuple(replace(product, coupled=bool(settings["coupled"])) for product in tracked)


def _job(
    tracked: Sequence[cost.Product], settings: Mapping[str, Any], config: PretrainedConfig, written: Mapping[str, Any]
) -> Job:
    dtype = settings["dtype"]
    is_bfloat16 = config.dtype == torch.bfloat16 if dtype in ("auto", None) else dtype == "bfloat16"
    element = 2 if is_bfloat16 else 4
    return Job(
        tuple(tracked), settings["tokens"], settings["seq_len"], settings["batch_size"], element, *_limits(written)
    )


def _written(path: Path) -> dict[str, Any]:
    """The sections of a config of ``fit``."""
    found = read_yaml(path)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise InputError(f"{path}: not a config of fit: it has no section `model`")
    if found.get("crystallize") is not None or found["model"].get("training") is not None:
        raise InputError(f"plan is for collections; {path} has a section `crystallize` or `model.training`")
    return {name: section for name, section in found.items() if isinstance(section, dict)}


def _limits(written: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Cap on bytes beside the weights, and projections a pass."""
    gigabytes, layers = (written.get("collect", {}).get(key) for key in ("max_memory_gb", "layers_per_pass"))
    if type(gigabytes) not in (int, float, type(None)) or (gigabytes is not None and not gigabytes > 0):
        raise InputError(f"collect.max_memory_gb is {gigabytes!r}; it must be a number above 0")
    if type(layers) not in (int, type(None)):
        raise InputError(f"collect.layers_per_pass is {layers!r}; it must be a whole number")
    return None if gigabytes is None else gigabytes * 1e9, layers


def _not_planned(written: Mapping[str, Any]) -> list[str]:
    values = {f"{section}.{key}": written.get(section, {}).get(key) for section, key in NOT_PLANNED}
    found = [name for name, value in values.items() if value and (name, value) != ("model.mc_samples", 1)]
    return [f"not in this plan: {', '.join(found)}"] if found else []


def _model(options: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[str, PretrainedConfig, bool]:
    """The model's name and configuration, and whether it is that of a published shape, which is not looked up."""
    name = options["model"] or section.get("model_name")
    shape = options["shape"] or next((short for short, (hub, _) in SHAPES.items() if hub == name), None)
    if shape:
        config = published_config(shape)
        return SHAPES[shape][0], config, True
    architecture = section.get("architecture")
    if not isinstance(architecture, dict | None) or not isinstance(name, str | None):
        raise InputError("model: model_name must be a text, architecture a mapping")
    if name is None:
        return "the architecture", load_config(None, architecture), False
    trusted = options["trust_remote_code"] or section.get("trust_remote_code") is True
    revision, gguf_file = (options.get(key) or section.get(key) for key in ("revision", "gguf_file"))
    source = ModelSource.named(name, revision, gguf_file, None, trusted)
    return source.name, load_config(source, architecture), False


def hardware_of(options: Mapping[str, Any]) -> Hardware:
    """A machine of the table, with the figures of it that are given.

    Raises:
        InputError: It is not in the table, or a figure cannot be.
    """
    changes = {}
    for option, (field, unit) in OVERRIDES.items():
        if (value := options[option]) is None:
            continue
        is_share = field == "efficiency"
        if not 0 < value < float("inf") or (is_share and value > 1):
            raise InputError(f"{option} is {value}; it must be above 0{' and at most 1' * is_share}", option)
        changes[field] = value * unit
    return replace(find_hardware(options["hardware"]), **changes)


def _of_mlp(module: nn.Module) -> list[str]:
    """The projections of a mixture's dense blocks, experts and shared experts, as far as it has them."""
    there = {projection_of(name) for name in find_layers(module)}
    return [projection for projection in PROJECTIONS if projection.rpartition("_")[2] in MLP and projection in there]


def _about_experts(tracked: Sequence[cost.Product], tokens: int) -> list[str]:
    """What a budget of tokens leaves for an expert."""
    experts = [product for product in tracked if product.expert is not None]
    if not experts:
        return []
    each = round(tokens * experts[0].share)
    enough = max(max(product.d_out, product.d_in) for product in experts)
    note = f"an expert sees {experts[0].share:.1%} of the tokens on average: {each:,} of {tokens:,}"
    if each < 2 * enough:
        note += f"; one that fewer than {enough:,} come to is left unedited (edit.expert_min_tokens): take more tokens"
    return [note]
