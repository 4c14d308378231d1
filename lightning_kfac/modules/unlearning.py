"""Unlearning as training: a forget set is unlearned while the loss on text stays, in some layers of a model.

A step takes a batch of either; ranks share out both. The forget set is all of the memorized text that is ever seen.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, Optimizer
from typing_extensions import override

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.distributed.sharding import is_spread
from lightning_kfac.errors import InputError
from lightning_kfac.math.unlearning import npo, subnet_mask, target_log_p
from lightning_kfac.methods.training import NPO, BalancedSubnet, GradientAscent, TrainedMethod
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.tokens import TokenBatch, parts_of
from lightning_kfac.modules.sequence_training import SequenceSteps, SequenceTraining, StepBatch, StepLoader, in_float32

MOMENTUM = 0.9


class BothBatches(TypedDict):
    """What one rank takes in one step: of the forget set, and of the text."""

    forget: StepBatch
    retain: StepBatch


@dataclass(frozen=True)
class BothSteps:
    """The batches of a training by the number of the step, for one rank."""

    forget: SequenceSteps
    retain: SequenceSteps

    def __getitem__(self, step: int) -> BothBatches:
        """Of a step, from 0."""
        return {"forget": self.forget[step], "retain": self.retain[step]}


class UnlearningLM(SequenceTraining):
    """A copy of a model in which some layers unlearn sequences by gradient ascent; the model itself stays as it is.

    Weights are trained in float32, and measured in the dtypes that they had.

    Args:
        model: The model.
        layers: Those that are trained, of this model, by name.
        forget: What is unlearned; none of those that are reported.
        retain: Text whose loss is to stay.
        method: How.

    Raises:
        InputError: The method cannot be had: fewer than two sequences of either kind, weights that are quantized,
            spread over ranks, or only a part of a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        forget: Sequence[MemorizedSequence],
        retain: Sequence[MemorizedSequence],
        method: TrainedMethod,
    ):
        check_trainable(layers, method.name)
        for what, sequences in (("the forget set", forget), ("the text to retain", retain)):
            if len(sequences) < 2:
                raise InputError(f"methods: {method.name}: {what} has {len(sequences)} sequences; it takes two or more")
        names = [layer.parameter_name for layer in layers.values()]
        trained = copy.deepcopy(model).requires_grad_(False)
        settings = {"steps": method.steps, "batch_size": method.batch_size, "lr": method.lr, "seed": method.seed}
        super().__init__(trained, forget, **settings)  # type: ignore[arg-type]
        self.dtypes = in_float32(trained)
        self.retained = retain
        self.method = method
        self.names = names
        self.widths = [layer.shape[1] for layer in layers.values()]
        for name in names:
            trained.get_parameter(name).requires_grad_(True)

    @override
    def train_dataloader(self) -> StepLoader:
        """This rank's batches of both kinds, from the step that the trainer stands at."""
        trainer = self.trainer
        share = trainer.global_rank, trainer.world_size
        forget, retain = (
            SequenceSteps(sequences, self.batch_size, self.seed, *share)
            for sequences in (self.sequences, self.retained)
        )
        return StepLoader(BothSteps(forget, retain), trainer.global_step, self.steps)

    def weights(self) -> dict[str, Tensor]:
        """What stands in place of the model's parameters while it is trained; by default nothing."""
        return {}

    def log_p(self, tokens: TokenBatch, weights: dict[str, Tensor]) -> Tensor:
        """Sum over the targets of each row of their log probabilities, with ``weights``. float32 [B]."""
        model = language_model(self.model)
        rows = []
        for part in parts_of(model, tokens, len(tokens.input_ids)):
            logits = functional_call(model, weights, (), part.model_inputs(model)).logits
            rows.append(target_log_p(logits, part.targets).sum(1))
        return torch.cat(rows)

    def forget_loss(self, batch: StepBatch, weights: dict[str, Tensor]) -> Tensor:
        """This rank's part of the loss on the forget set: here a sum divided by the number of targets of all ranks."""
        return self.log_p(batch["tokens"], weights).sum() / batch["n_targets"]

    @override
    def training_step(self, batch: BothBatches, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Both losses, each a mean over all ranks, whose gradients Lightning averages."""
        weights = self.weights()
        retain = -self.log_p(batch["retain"]["tokens"], weights).sum() / batch["retain"]["n_targets"]
        weight = self.method.weight
        loss = (weight * self.forget_loss(batch["forget"], weights) + (1 - weight) * retain) * self.trainer.world_size
        mean: Any = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        self.log("train/loss", mean, batch_size=self.batch_size)
        return loss

    @override
    def configure_optimizers(self) -> Optimizer:
        """Adam on the chosen layers."""
        return Adam([self.model.get_parameter(name) for name in self.names], lr=self.lr)


class NegativePreferenceLM(UnlearningLM):
    """The same by negative preference optimization; the reference is the model as it was."""

    method: NPO
    reference: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Kept in checkpoints: where a training goes on, the model is not the reference any more.
        self.register_buffer("reference", torch.full((len(self.sequences),), torch.nan))

    @override
    def on_fit_start(self) -> None:
        """Computes the log probabilities of the reference once, before the training."""
        if not self.reference.isnan().any():
            return
        with torch.no_grad():
            for number, sequence in enumerate(self.sequences):
                tokens = SequenceSteps([sequence], 1)[0]["tokens"].to(self.device)
                self.reference[number] = self.log_p(tokens, {})[0]

    @override
    def forget_loss(self, batch: StepBatch, weights: dict[str, Tensor]) -> Tensor:
        """Mean over the sequences of all ranks."""
        log_p = self.log_p(batch["tokens"], weights)
        if not batch["index"]:  # a rank without a sequence
            return 0 * log_p.sum()
        return npo(log_p, self.reference[batch["index"]], self.method.beta).sum() / self.batch_size


class BalancedSubnetLM(UnlearningLM):
    """A score for each weight of the chosen layers is learned; those with the largest |score| are dropped.

    Scores begin uniform in +-1 / sqrt(d_in).
    """

    method: BalancedSubnet

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        generator = torch.Generator().manual_seed(self.seed)
        scores = []
        for name, d_in in zip(self.names, self.widths, strict=True):
            W = self.model.get_parameter(name).requires_grad_(False)
            drawn = torch.rand(W.shape, generator=generator) * 2 - 1
            scores.append(nn.Parameter(drawn / d_in**0.5))
        self.scores = nn.ParameterList(scores)

    @override
    def weights(self) -> dict[str, Tensor]:
        """The chosen weights without what is dropped."""
        return {
            name: self.model.get_parameter(name) * subnet_mask(scores, self.method.ratio)
            for name, scores in zip(self.names, self.scores, strict=True)
        }

    @contextmanager
    @override
    def as_stored(self) -> Iterator[nn.Module]:
        """The model without what is dropped."""
        whole = {name: self.model.get_parameter(name).data for name in self.names}
        with torch.no_grad():
            for name, masked in self.weights().items():
                self.model.get_parameter(name).data = masked
        try:
            with super().as_stored() as model:
                yield model
        finally:
            for name, data in whole.items():
                self.model.get_parameter(name).data = data

    @override
    def configure_optimizers(self) -> Optimizer:
        """SGD with momentum on the scores."""
        return SGD(self.scores.parameters(), lr=self.lr, momentum=MOMENTUM)


TRAININGS: dict[type[TrainedMethod], type[UnlearningLM]] = {
    GradientAscent: UnlearningLM,
    NPO: NegativePreferenceLM,
    BalancedSubnet: BalancedSubnetLM,
}


def check_trainable(layers: Mapping[str, Layer], method: str) -> None:
    """Raises ``InputError`` for a layer whose weight cannot be trained by itself."""
    for name, layer in layers.items():
        if (what := layer.packed()) is not None:
            raise InputError(f"methods: {method}: {name} is a {what}: load the model without quantization")
        if is_spread(layer.parameter):
            raise InputError(f"methods: {method}: {name} is sharded: train with one device, or ddp")
        if layer.parameter.numel() != layer.shape[0] * layer.shape[1]:
            raise InputError(f"methods: {method}: {name} is a part of {layer.parameter_name}: only whole weights train")
