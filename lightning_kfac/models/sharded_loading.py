"""Loading a model whose weights are spread over ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import shard
from lightning_kfac.models.loading import Dtype, load_config, load_model, skeleton
from lightning_kfac.models.targets import block_modules


def load_sharded(
    mesh: DeviceMesh,
    device: torch.device,
    model_name: str | None,
    dtype: Dtype = "auto",
    *,
    architecture: dict | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """``load_model`` with the weights spread over ranks, frozen. Only rank 0 reads them, into the CPU's memory.

    Args:
        mesh: One-dimensional: the ranks that share the weights.
        device: Of this rank.
        model_name, dtype, architecture, trust_remote_code: As for ``load_model``.

    Raises:
        InputError: As ``load_model``, on every rank; or the model has no numbered blocks.
    """
    ranks, source = current_ranks(), None
    with ranks.together():
        if ranks.rank == 0:
            source = load_model(model_name, dtype, architecture=architecture, trust_remote_code=trust_remote_code)
    known = ranks.gather(None if source is None else _small_parts(source))[0]
    model = skeleton(load_config(model_name, architecture, trust_remote_code), trust_remote_code)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(known["dtypes"][name])
    shard(model.eval().requires_grad_(False), block_modules(model), mesh)
    model.to_empty(device=device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if source is None else source.state_dict(), options=options)
    # What is computed when a model is made (the frequencies of RoPE, for one) is in no checkpoint.
    for name, tensors in known["tensors"].items():
        module = model.get_submodule(name)
        for key, tensor in tensors.items():
            setattr(module, key, tensor.to(device))
    model.generation_config = known["generation_config"]
    return model


def _small_parts(model: nn.Module) -> dict[str, Any]:
    """What ranks that have not read a model need to know beside its weights."""
    tensors = {
        name: {k: v for k, v in (*module.named_buffers(recurse=False), *vars(module).items()) if isinstance(v, Tensor)}
        for name, module in model.named_modules()
    }
    return {
        "dtypes": {name: parameter.dtype for name, parameter in model.named_parameters()},
        "tensors": {name: found for name, found in tensors.items() if found},
        "generation_config": getattr(model, "generation_config", None),
    }
