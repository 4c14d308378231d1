"""What a user asks to have planned."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from jsonargparse import Namespace
from transformers import PretrainedConfig

from lightning_kfac.collection.memory import readable_bytes
from lightning_kfac.errors import InputError
from lightning_kfac.models.loading import Dtype, load_config, skeleton
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import SHAPES, published_config, read_architecture
from lightning_kfac.planning.hardware import Hardware, find_hardware
from lightning_kfac.planning.run import Job, RunPlan
from lightning_kfac.storage.yaml_files import read_yaml

# What train.py takes where nothing is said.
DEFAULTS = {"seq_len": 512, "batch_size": 8, "blocks": "all"}
MLP = ["gate", "up", "down"]
ATTENTION = ["q", "k", "v", "o"]
# Options of this command and where they stand in a train.py config.
PLACES = {
    "tokens": ("data", "max_tokens"),
    "seq_len": ("data", "seq_len"),
    "batch_size": ("data", "batch_size"),
    "blocks": ("collect", "blocks"),
    "projections": ("collect", "projections"),
    "modules": ("collect", "modules"),
    "dtype": ("model", "dtype"),
}
# Settings of a train.py config that change what a run takes and are not in the arithmetic.
NOT_PLANNED = (("model", "mc_samples"), ("collect", "moments"), ("collect", "shard_factors"), ("data", "domains"))
OVERRIDES = {"memory_gb": ("memory", 1e9), "peak_tflops": ("flops", 1e12), "link_gb": ("within", 1e9),
             "network_gb": ("between", 1e9), "efficiency": ("efficiency", 1)}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        title: The model as the user knows it.
        model, job: For the arithmetic.
        words: Arguments of train.py that say the same.
        notes: What the user should know about the choice of layers, and about what is left out.
    """

    title: str
    model: cost.Architecture
    job: Job
    words: list[str]
    notes: tuple[str, ...] = ()


def read_request(options: Namespace) -> Request:
    if sum(bool(options[name]) for name in ("train_config", "model", "shape")) != 1:
        raise InputError("say which model: one of --train_config, --model or --shape")
    written = _train_config(Path(options.train_config)) if options.train_config else {}
    title, config, is_published = _model(options, written.get("model", {}))
    if is_published and (options.dtype or written.get("model", {}).get("dtype") or "auto") == "auto":
        options.dtype = "bfloat16"  # the checkpoint was not asked, so the command has to say it
    values, given = {}, []
    for name, (section, key) in PLACES.items():
        values[name] = options[name] if options[name] is not None else written.get(section, {}).get(key)
        if options[name] is not None:
            given += [f"--{section}.{key}", _word(options[name])]
    values = {name: DEFAULTS.get(name) if value is None else value for name, value in values.items()}
    for name in ("tokens", "seq_len", "batch_size"):
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1:
            raise InputError(f"--{name} must be a number of at least 1, got {values[name]!r}")
    for name in ("projections", "modules"):
        if not isinstance(values[name], list | None):
            raise InputError(f"--{name} must be a list, got {values[name]!r}")
    if values["blocks"] != "all" and not isinstance(values["blocks"], list):
        raise InputError(f"--blocks must be all or a list of block numbers, got {values['blocks']!r}")
    try:
        module = skeleton(config, options.trust_remote_code)
    except Exception as error:
        raise InputError(f"{title}: no causal language model: {' '.join(str(error).split())[:200]}") from None
    model, notes = read_architecture(module), _not_planned(written)
    experts = any(product.copies > 1 for product in model.products)
    if values["projections"] is None:
        values["projections"] = ATTENTION if experts else MLP
        if experts and values["modules"] is None:
            given += ["--collect.projections", _word(ATTENTION)]
    layers = resolve_targets(module, values["blocks"], values["projections"], values["modules"])
    tracked = tuple(model.select(layers))
    if len(tracked) < len(layers):
        raise InputError("the head cannot be planned: leave it out of --modules")
    if experts:
        notes = [_about_experts(model, {product.block for product in tracked}), *notes]
    if values["dtype"] not in (*get_args(Dtype), None):
        raise InputError(f"model.dtype is {values['dtype']!r}; choose {', '.join(get_args(Dtype))}")
    is_auto = values["dtype"] in ("auto", None)
    bfloat16 = config.dtype == torch.bfloat16 if is_auto else values["dtype"] == "bfloat16"
    job = Job(
        tracked, values["tokens"], values["seq_len"], values["batch_size"], 2 if bfloat16 else 4, *_limits(written)
    )
    source = (
        ["--config", options.train_config]
        if options.train_config
        else ["--model.model_name", title, "--data.corpus", "TEXT"]
    )
    return Request(title, model, job, [*source, *given], tuple(notes))


def _word(value: str | int | list) -> str:
    """As it is written on a command line."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _train_config(path: Path) -> dict:
    found = read_yaml(path)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise InputError(f"--train_config {path}: not a config of train.py fit: it has no section `model`")
    if found.get("crystallize") is not None or found["model"].get("training") is not None:
        raise InputError(f"plan is for collections; {path} has a section `crystallize` or `model.training`")
    return {name: section for name, section in found.items() if isinstance(section, dict)}


def _limits(written: dict) -> tuple[float | None, int | None]:
    """Cap on bytes beside the weights, and projections a pass."""
    gigabytes, layers = (written.get("collect", {}).get(key) for key in ("max_memory_gb", "layers_per_pass"))
    if type(gigabytes) not in (int, float, type(None)) or (gigabytes is not None and not gigabytes > 0):
        raise InputError(f"collect.max_memory_gb is {gigabytes!r}; it must be a number above 0")
    if type(layers) not in (int, type(None)):
        raise InputError(f"collect.layers_per_pass is {layers!r}; it must be a whole number")
    return None if gigabytes is None else gigabytes * 1e9, layers


def _not_planned(written: dict) -> list[str]:
    values = {f"{section}.{key}": written.get(section, {}).get(key) for section, key in NOT_PLANNED}
    found = [name for name, value in values.items() if value and (name, value) != ("model.mc_samples", 1)]
    return [f"not in this plan: {', '.join(found)}"] if found else []


def _model(options: Namespace, section: dict) -> tuple[str, PretrainedConfig, bool]:
    """The model's name and configuration, and whether it is that of a published shape, which is not looked up."""
    name = options.model or section.get("model_name")
    shape = options.shape or next((short for short, (hub, _) in SHAPES.items() if hub == name), None)
    if shape:
        config = published_config(shape)
        return SHAPES[shape][0], config, True
    architecture = section.get("architecture")
    if not isinstance(architecture, dict | None) or not isinstance(name, str | None):
        raise InputError("model: model_name must be a text, architecture a mapping")
    return name or "the architecture", load_config(name, architecture, options.trust_remote_code), False


def hardware_of(options: Namespace) -> Hardware:
    changes = {}
    for option, (field, unit) in OVERRIDES.items():
        if (value := options[option]) is None:
            continue
        if not 0 < value < float("inf") or (field == "efficiency" and value > 1):
            raise InputError(f"--{option} is {value}; it must be above 0{' and at most 1' * (field == 'efficiency')}")
        changes[field] = value * unit
    return replace(find_hardware(options.hardware), **changes)


def _about_experts(model: cost.Architecture, blocks: Iterable[int]) -> str:
    experts = cost.experts_apart(model, blocks)
    return (
        "experts are 3-D parameters, which cannot be tracked; attention projections can. Tracking gate, up and down of "
        f"every expert in these blocks would take {readable_bytes(cost.accumulator_bytes(experts))} of accumulators "
        f"and {cost.covariance_flops(experts) / 1e9:.2f} GFLOP a token."
    )


def command_for(request: Request, options: Namespace, plan: RunPlan) -> str:
    launcher = ["python"]
    if options.nodes > 1:
        launcher = ["torchrun", "--nnodes", options.nodes, "--nproc-per-node", options.devices, "--rdzv-backend",
                    "c10d", "--rdzv-endpoint", "FIRST_NODE:29500", "--rdzv-id", "collect"]  # fmt: skip
    words = [*launcher, "train.py", "fit", *request.words, "--trainer.devices", options.devices]
    words += ["--trainer.num_nodes", options.nodes] if options.nodes > 1 else []
    words += ["--trainer.strategy", plan.strategy] if plan.ranks > 1 else []
    words += ["--trainer.accelerator", "cpu"] if options.hardware == "cpu" else []
    return shlex.join(map(str, words))
