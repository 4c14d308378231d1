"""A short identity of a model's weights."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_kfac.distributed.sharding import whole
from lightning_kfac.models.layers import find_layers

SAMPLES = 4096


def weights_fingerprint(model: nn.Module, tracked: Collection[str]) -> str:
    """Hash of all parameter names and shapes, of the tracked layers' values and of samples of the rest.

    Values are cast to float32 first, so loading a bfloat16 checkpoint in float32 changes nothing. An
    edit of a tracked layer always changes the fingerprint. Of a sharded model one parameter at a time is
    put together, and all ranks must call this; how it is sharded changes nothing.

    Args:
        tracked: Dotted names of the layers whose weights count in full.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    layers = find_layers(model)
    full = {layers[name].parameter_name for name in tracked if name in layers}
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        values = whole(parameter.detach())
        digest.update(_bytes(values if name in full else _strided_sample(values)))
    return digest.hexdigest()[:32]


def _strided_sample(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat[:: max(1, len(flat) // SAMPLES)]


def _bytes(values: Tensor) -> memoryview:
    return values.to("cpu", torch.float32).contiguous().numpy().data.cast("B")
