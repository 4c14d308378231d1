"""Training on memorized sequences: the base of attacks and methods that learn, or unlearn, with gradients.

A step's batch is a function of its number alone, so a training that is resumed, or shared out over ranks, takes the
same steps. Ranks share out the sequences of a step, and the loss is the mean over the targets of all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Adam, Optimizer
from typing_extensions import Self, override

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import IGNORED
from lightning_kfac.models.language import language_model
from lightning_kfac.models.tokens import TokenBatch, parts_of

OPTIMIZERS: dict[str, type[Adam] | type[SGD]] = {"adam": Adam, "sgd": SGD}


class StepBatch(TypedDict):
    """What one rank takes in one step.

    Attributes:
        tokens: Its rows; labels of the suffixes alone.
        index: Numbers of its sequences; empty where there are fewer sequences than ranks.
        n_targets: Tokens that count in the step, of all ranks.
    """

    tokens: TokenBatch
    index: list[int]
    n_targets: int


@dataclass(frozen=True)
class SequenceSteps:
    """The batches of a training, by the number of the step, for one rank.

    Sequences come in an order of their own in every round, round after round.

    Attributes:
        sequences: What is learned: the suffix after the prefix; without a prefix all but the first token.
        batch_size: Sequences a step, of all ranks together.
        seed: Of the order.
        rank, world: Which share of each step is this rank's.
    """

    sequences: Sequence[MemorizedSequence]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def numbers(self, step: int) -> list[int]:
        """The sequences of a step, on all ranks.

        Example:
            >>> steps = SequenceSteps([MemorizedSequence([1], [2])] * 5, 4)
            >>> sorted(steps.numbers(0) + steps.numbers(1)[:1])
            [0, 1, 2, 3, 4]
        """
        n = len(self.sequences)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        rounds = range(places[0] // n, places[-1] // n + 1)
        orders = {r: np.random.default_rng((self.seed, r)).permutation(n) for r in rounds}
        return [int(orders[place // n][place % n]) for place in places]

    def __getitem__(self, step: int) -> StepBatch:
        """The batch of a step, from 0."""
        numbers = self.numbers(step)
        n_targets = sum(_n_targets(self.sequences[number]) for number in numbers)
        mine = numbers[self.rank :: self.world]
        rows = [self.sequences[number] for number in mine] or [self.sequences[numbers[0]]]
        ids = [torch.tensor([*row.prefix, *row.suffix]) for row in rows]
        labels = [row_ids.clone() for row_ids in ids]
        for row, row_labels in zip(rows, labels, strict=True):
            row_labels[: len(row.prefix) if mine else None] = IGNORED  # a rank without a sequence learns nothing
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row_ids) for row_ids in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "sample_index": torch.tensor(mine or numbers[:1]),
        }
        return {"tokens": TokenBatch.from_dict(batch), "index": mine, "n_targets": n_targets}


def _n_targets(sequence: MemorizedSequence) -> int:
    return len(sequence.suffix) if len(sequence.prefix) else len(sequence.suffix) - 1


class Steps(Protocol):
    """What a rank takes in each step."""

    def __getitem__(self, step: int) -> Any:
        """Of a step, from 0."""


@dataclass(frozen=True)
class StepLoader:
    """The batches of steps in order, as long as the whole training wherever it begins.

    No DataLoader: Lightning would share it out over ranks once more.

    Attributes:
        data: The batches.
        begin, end: The first step, and the one behind the last.
    """

    data: Steps
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end

    def __iter__(self) -> Iterator[Any]:
        return (self.data[step] for step in range(self.begin, self.end))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's step says where a training goes on. Lightning asks whether it can."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class SequenceTraining(LightningModule):
    """Trains a model on sequences for some steps; a subclass may have another loss.

    Goes on from a checkpoint of Lightning's (``trainer.save_checkpoint``, ``trainer.fit(ckpt_path=...)``) as if it had
    never stopped. Dropout is off.

    Args:
        model: Trained in place, in the precision of its weights; those that require a gradient.
        sequences: What is learned.
        steps: Optimizer steps in all.
        batch_size: Sequences a step, of all ranks together.
        optimizer: ``adam`` (no weight decay) or ``sgd`` (no momentum).
        lr: The same in every step.
        seed: Of the order of the sequences.

    Attributes:
        losses: Mean loss of a target before each step that this process has taken, of all ranks.
        dtypes: In which a parameter is stored, by name, where it is trained in another one.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[MemorizedSequence],
        *,
        steps: int,
        batch_size: int,
        optimizer: Literal["adam", "sgd"] = "adam",
        lr: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__()
        if not sequences:
            raise InputError("there is no sequence to train on")
        self.model = model
        self.sequences = sequences
        self.steps = steps
        self.batch_size = batch_size
        self.optimizer_name = optimizer
        self.lr = lr
        self.seed = seed
        self.losses: list[float] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.train(False)

    @override
    def train(self, mode: bool = True) -> Self:
        """Keeps dropout off, so that a step depends on nothing but its number."""
        super().train(False)
        return self

    @override
    def setup(self, stage: str) -> None:
        """Refuses strategies that spread the weights."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(f"{type(strategy).__name__} cannot train sequences here; use one device, or ddp")

    @override
    def train_dataloader(self) -> StepLoader:
        """This rank's batches, from the step that the trainer stands at."""
        trainer = self.trainer
        data = SequenceSteps(self.sequences, self.batch_size, self.seed, trainer.global_rank, trainer.world_size)
        return StepLoader(data, trainer.global_step, self.steps)

    @override
    def configure_optimizers(self) -> Optimizer:
        """Adam or SGD on what requires a gradient."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return OPTIMIZERS[self.optimizer_name](trained, lr=self.lr)

    def summed_loss(self, tokens: TokenBatch) -> Tensor:
        """What is minimised, summed over the targets of a rank's rows; here the cross-entropy of the suffixes."""
        model = language_model(self.model)
        return torch.stack([part.gold_loss(model) for part in parts_of(model, tokens, len(tokens.input_ids))]).sum()

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The mean over the targets of all ranks, whose gradients Lightning averages."""
        loss = self.summed_loss(batch["tokens"]) * (self.trainer.world_size / batch["n_targets"])
        mean: Any = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        self.log("train/loss", mean, batch_size=len(batch["index"]))
        return loss

    @contextmanager
    def as_stored(self) -> Iterator[nn.Module]:
        """The model as it would be used: its weights for the moment in the dtypes that they had."""
        trained = {name: p.data for name, p in self.model.named_parameters() if name in self.dtypes}
        parameters = dict(self.model.named_parameters())
        try:
            for name in trained:
                parameters[name].data = trained[name].to(self.dtypes[name])
            yield self.model
        finally:
            for name, data in trained.items():
                parameters[name].data = data


def in_float32(model: nn.Module) -> dict[str, torch.dtype]:
    """Makes all parameters float32, so that small steps are not lost; gives the dtypes that they had, by name."""
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters():
        dtypes[name] = parameter.dtype
        parameter.data = parameter.data.float()
    return dtypes
