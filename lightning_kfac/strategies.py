"""Lightning strategies that work with everything frozen."""

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_kfac.errors import InputError


class FrozenDDPStrategy(DDPStrategy):
    """DDP for a model without trainable parameters, which torch's wrapper refuses.

    There are no weight gradients to reduce, so the module is not wrapped; its weights are only made
    equal on all ranks. A model with trainable parameters gets ordinary DDP.
    """

    def configure_ddp(self) -> None:
        """Copies the weights of rank 0 to all ranks."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            super().configure_ddp()
            return
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)


def strategy_for(name: object, n_processes: int) -> object:
    """Maps the strategy that a user asked for to one that works in a collection.

    Raises:
        InputError: The strategy cannot collect, with the one that can.
    """
    if name in ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false") or (
        name == "auto" and n_processes > 1
    ):
        return FrozenDDPStrategy()
    if isinstance(name, str) and name.startswith("ddp_"):
        raise InputError(
            f"trainer.strategy {name} leaves the parent process without factors; use --trainer.strategy ddp"
        )
    return name
