"""Lightning strategies that work with everything frozen."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_kfac.errors import InputError, first_line

FSDP = "fsdp"
# Ranks wait for each other's decompositions and files; that a rank is gone is RankWatch's to find out, within a minute.
LONGEST_WAIT = timedelta(hours=12)


class FrozenDDPStrategy(DDPStrategy):
    """DDP for a model without trainable parameters, which torch's wrapper refuses.

    There are no weight gradients to reduce, so the module is not wrapped; its weights are only made
    equal on all ranks. A model with trainable parameters gets ordinary DDP.
    """

    @override
    def configure_ddp(self) -> None:
        """Copies the weights of rank 0 to all ranks."""
        model = self.model
        if model is None or any(parameter.requires_grad for parameter in model.parameters()):
            super().configure_ddp()
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks: each holds its part of every block's weights, and of the Kronecker factors.

    ``CausalLM.configure_model`` spreads the weights. On CPUs (gloo) as on GPUs (NCCL).
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, timeout=LONGEST_WAIT)

    @override
    def setup_environment(self) -> None:
        """Makes a mesh of all ranks of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # A collection changes no weight: its checkpoint is progress alone, which rank 0 writes and every rank reads.

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """No weight has to be there first."""
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """That of an optimizer without parameters of the model."""
        return optimizer.state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Has rank 0 write."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads it."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)


def strategy_for(settings: Mapping[str, Any]) -> str | Strategy:
    """Maps the strategy that a user asked for to one that works in a collection.

    Args:
        settings: Arguments of the Trainer.

    Raises:
        InputError: The strategy cannot collect (the message names one that can), or the Trainer does not
            take the settings.
    """
    name = settings["strategy"]
    _refuse(name)
    if isinstance(name, str):
        chosen = {key: settings[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
        if name == FSDP:  # Lightning's own of this name is FSDP1, which refuses CPUs
            chosen["strategy"] = "ddp"
        trial = quiet_trainer("trainer", **chosen)
        _check_launch(trial)
        if name == FSDP:
            return ShardedStrategy()
        if type(trial.strategy) is DDPStrategy and trial.strategy._start_method == "popen":
            return FrozenDDPStrategy(timeout=LONGEST_WAIT)
    if isinstance(name, ModelParallelStrategy):
        return ShardedStrategy()
    return name


def quiet_trainer(of: str, **settings: Any) -> Trainer:
    """A Trainer that writes and shows nothing.

    Args:
        of: Names the settings in messages.
        settings: Its arguments.

    Raises:
        InputError: It does not take them: no such device or strategy, or none here.
    """
    try:
        return Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        said = first_line(error)
        mend = "; accelerator auto takes what is here" if "backend" in said or "accelerator" in said.lower() else ""
        raise InputError(f"{of}: {said.rstrip('!.')}{mend}") from None


def evaluation_trainer(folder: Path, accelerator: str) -> Trainer:
    """A quiet Trainer for the validation loop alone, on one device.

    Raises:
        InputError: There is no such accelerator here.
    """
    return quiet_trainer(
        f"accelerator {accelerator}",
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        use_distributed_sampler=False,
    )


def _refuse(strategy: object) -> None:
    """Raises ``InputError`` for strategies under which a collection would fail or be wrong."""
    if isinstance(strategy, str):
        if strategy.startswith("ddp_"):
            raise InputError(
                f"trainer.strategy {strategy} leaves the parent process without factors; use --trainer.strategy ddp"
            )
        other = strategy != FSDP and strategy.startswith((FSDP, "deepspeed", "xla"))
    else:
        other = isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy))
    if other:
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise InputError(f"trainer.strategy {name} cannot collect curvature; use --trainer.strategy fsdp (FSDP2)")
    # 'auto' would be all devices of a node.
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size != 1:
        raise InputError(
            f"trainer.strategy {type(strategy).__name__}: tensor parallelism (tensor_parallel_size "
            f"{strategy._tensor_parallel_size}) is not supported; use --trainer.strategy fsdp"
        )


def _check_launch(trainer: Trainer) -> None:
    """torchrun with fewer devices than processes would run independent copies of the whole job."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ and trainer.world_size != launched:
        raise InputError(
            f"torchrun started {launched} processes, but trainer.devices asks for {trainer.num_devices} on each of "
            f"{trainer.num_nodes} nodes; set --trainer.devices to torchrun's --nproc-per-node"
        )
