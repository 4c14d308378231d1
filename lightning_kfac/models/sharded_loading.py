"""Loading a model whose weights are spread over ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import shard
from lightning_kfac.models.dtypes import mark_stored_dtype, stored_dtype
from lightning_kfac.models.loading import Dtype, load_config, load_model, skeleton
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.targets import block_modules

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class _SmallParts:
    """What ranks that have not read a model need to know beside its weights.

    Attributes:
        dtypes: Of the parameters, by name.
        tensors: Buffers and other tensors that modules keep, by module and attribute.
        generation_config: The model's, if it has one.
        stored_dtype: That its weights are written in.
    """

    dtypes: dict[str, torch.dtype]
    tensors: dict[str, dict[str, Tensor]]
    generation_config: "GenerationConfig | None"
    stored_dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> "_SmallParts":
        tensors = {
            name: {
                k: v for k, v in (*module.named_buffers(recurse=False), *vars(module).items()) if isinstance(v, Tensor)
            }
            for name, module in model.named_modules()
        }
        return cls(
            {name: parameter.dtype for name, parameter in model.named_parameters()},
            {name: found for name, found in tensors.items() if found},
            getattr(model, "generation_config", None),
            stored_dtype(model),
        )


def load_sharded(
    mesh: DeviceMesh,
    device: torch.device,
    model_name: str | ModelSource | None,
    dtype: Dtype = "auto",
    *,
    architecture: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """``load_model`` with the weights spread over ranks, frozen. Only rank 0 reads them, into the CPU's memory.

    Args:
        mesh: One-dimensional: the ranks that share the weights.
        device: Of this rank.
        model_name, dtype, architecture: As for ``load_model``.

    Raises:
        InputError: As ``load_model``, on every rank; or the model has no numbered blocks.
    """
    ranks = current_ranks()
    source: PreTrainedModel | None = None
    with ranks.together():
        if ranks.rank == 0:
            source = load_model(model_name, dtype, architecture=architecture)
    of_ranks = ranks.gather(None if source is None else _SmallParts.of(source))
    (known,) = [parts for parts in of_ranks if parts is not None]  # rank 0's
    trusted = isinstance(model_name, ModelSource) and model_name.trust_remote_code
    model = skeleton(load_config(model_name, architecture), trusted)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(known.dtypes[name])
    mark_stored_dtype(model, known.stored_dtype)
    shard(model.eval().requires_grad_(False), block_modules(model), mesh)
    model.to_empty(device=device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if source is None else source.state_dict(), options=options)
    # What is computed when a model is made (the frequencies of RoPE, for one) is in no checkpoint.
    for name, tensors in known.tensors.items():
        module = model.get_submodule(name)
        for key, tensor in tensors.items():
            setattr(module, key, tensor.to(device))
    if known.generation_config is not None:
        model.generation_config = known.generation_config
    return model
