"""Lightning strategies that work with everything frozen."""

import os

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

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


def strategy_for(settings: dict) -> object:
    """Maps the strategy that a user asked for to one that works in a collection.

    Args:
        settings: Arguments of the Trainer.

    Raises:
        InputError: The strategy cannot collect (the message names one that can), or the Trainer does not
            take the settings.
    """
    name = settings["strategy"]
    if isinstance(name, str):
        chosen = {key: settings[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        try:
            trial = Trainer(**chosen, **quiet)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise InputError(f"trainer: {str(error).strip().splitlines()[0]}") from None
        _check_launch(trial)
        if type(trial.strategy) is DDPStrategy and trial.strategy.launcher is not None and not name.startswith("ddp_"):
            return FrozenDDPStrategy()
    if isinstance(name, str) and name.startswith("ddp_"):
        raise InputError(
            f"trainer.strategy {name} leaves the parent process without factors; use --trainer.strategy ddp"
        )
    return name


def _check_launch(trainer: Trainer) -> None:
    """torchrun with fewer devices than processes would run independent copies of the whole job."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ and trainer.world_size != launched:
        raise InputError(
            f"torchrun started {launched} processes, but trainer.devices asks for {trainer.num_devices} on each of "
            f"{trainer.num_nodes} nodes; set --trainer.devices to torchrun's --nproc-per-node"
        )
