"""Models whose weights are spread over ranks (FSDP2): reading and writing a weight that no rank holds whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, put together from its parts on all ranks where it is sharded; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(tensor: Tensor, values: Tensor) -> None:
    """Copies full values, the same on every rank, into a tensor: of a sharded one each rank takes its part."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
