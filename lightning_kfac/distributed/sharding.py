"""Models whose weights are spread over ranks (FSDP2), so that no device has to hold a model whole.

Every decoder block is gathered when it runs and given up after it. The input embedding and the output head are whole
on every rank: the loss and the evaluation use the head by itself, and both may be one tensor.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import Tensor, nn

from lightning_kfac.errors import InputError

# These take as long to import as torch; only where they are loaded can anything be sharded.
TENSORS = "torch.distributed.tensor"
MODULES = "torch.distributed.fsdp"

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


def shard(model: "PreTrainedModel", blocks: Sequence[nn.Module], mesh: "DeviceMesh") -> None:
    """Spreads a model's blocks, and what else lies between embedding and head, over the ranks of a mesh.

    Raises:
        InputError: There are no blocks.
    """
    from torch.distributed.fsdp import fully_shard

    if not blocks:
        raise InputError("the model has no numbered blocks to spread over ranks; leave --trainer.strategy fsdp out")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {end.get_parameter("weight") for end in ends if end is not None}
    for module in (*blocks, model.base_model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward of the model needs all ranks."""
    return _is_gathered(getattr(model, "base_model", model))


def _is_gathered(module: object) -> bool:
    """Whether a module's weights are put together when it runs."""
    if MODULES not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of weights that are whole for a moment while a sharded model runs: a block in use, and the next one."""
    root = getattr(model, "base_model", None)
    blocks = [module for module in model.modules() if _is_gathered(module) and module is not root]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    return 2 * max(sizes, default=0)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with every tensor whole; of a sharded one in the CPU's memory, and empty beside rank 0.

    All ranks must call it.
    """
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # A model's state is tensors alone; an optimizer's would not be.
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each rank holds only its part of a tensor."""
    if TENSORS not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, put together from its parts on all ranks where it is sharded; all ranks must call it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def assign(tensor: Tensor, values: Tensor) -> None:
    """Copies full values, the same on every rank, into a tensor: of a sharded one each rank takes its part."""
    if is_spread(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
