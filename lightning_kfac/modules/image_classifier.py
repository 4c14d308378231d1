"""The LightningModule of the image task: a small vision transformer that is trained, and then collected and edited."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from typing_extensions import Self, override

from lightning_kfac.collection.image_loss import ImageBatch, ImageLoss, Positions
from lightning_kfac.collection.objective import Runs
from lightning_kfac.console import say
from lightning_kfac.errors import InputError, first_line
from lightning_kfac.math.statistics import interval, paired_difference
from lightning_kfac.metrics.described import ImagesSeen
from lightning_kfac.metrics.image_labels import ValidationImages, WrongLabels
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.image_data import CLASSES, SIDE, WRONG, ImageData
from lightning_kfac.modules.optimizers import NoOptimizer
from lightning_kfac.storage.json_files import for_json

if TYPE_CHECKING:
    from transformers import ViTConfig, ViTForImageClassification

# A ViT of 0.1 M parameters: four patches of 4 x 4 pixels and the class token.
ARCHITECTURE: dict[str, Any] = {
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
# Of the images, not to be chosen.
OF_IMAGES: dict[str, Any] = {"image_size": SIDE, "num_channels": 1, "num_labels": CLASSES}
MODEL = "model"
LOOK_EVERY = 5  # epochs


@dataclass
class ImageTraining:
    """How the classifier is trained before its curvature is collected.

    Args:
        epochs: At most.
        lr: Peak learning rate of AdamW, one cycle (Smith and Topin, 2017).
        weight_decay: Of AdamW.
        until: Stop where this share of the wrong labels is known; looked at every 5 epochs.
    """

    epochs: int = 120
    lr: float = 3e-3
    weight_decay: float = 0.01
    until: float = 0.95


class ImageClassifier(LightningModule):
    """A ViT that knows some wrong labels by heart, frozen for a collection.

    Args:
        model_name: Folder of a checkpoint; without one the model is trained first, by a Trainer of its own, and written
            to ``model/`` in the run's folder.
        architecture: Settings of a ``ViTConfig`` for the model that is trained.
        training: How it is trained.
        positions: Which positions count in the curvature: the ``class`` token's, or ``all``.
        labels: ``sampled`` from the model's predictions (true Fisher), or ``gold``: those that it was trained on.
        mc_samples: Draws of labels a forward pass.
        seed: Of initial weights and sampled labels.
        skip_baseline: Do not evaluate the unedited model.

    Attributes:
        frozen: False only in the training.
        collection: What runs a batch of a collection; set by ``CurvatureCollector``.
        stage: Name of the next evaluation.
        results: Figures of the latest evaluation, and ``record`` the same with intervals and differences.
    """

    def __init__(
        self,
        model_name: str | None = None,
        architecture: dict[str, Any] | None = None,
        training: ImageTraining = ImageTraining(),  # noqa: B008 (nobody changes it)
        positions: Positions = "class",
        labels: Literal["sampled", "gold"] = "sampled",
        mc_samples: int = 1,
        seed: int = 0,
        skip_baseline: bool = False,
    ):
        super().__init__()
        if not (training.epochs >= 1 and training.lr > 0 and training.weight_decay >= 0 and 0 < training.until <= 1):
            raise InputError(f"model.training: {training} holds numbers that no training can have")
        self.model_name = model_name
        self.training_settings = training
        self.positions: Positions = positions
        self.labels = labels
        self.seed = seed
        self.skip_baseline = skip_baseline
        self.config = _vit_config(model_name, ARCHITECTURE | (architecture or {}))
        shape = (int(self.config.num_channels), SIDE, SIDE)
        self.objective = ImageLoss(shape, CLASSES, positions, labels, seed, mc_samples)
        self.model: ViTForImageClassification | None = None
        self.frozen = True
        self.collection: Runs | None = None
        self.strict_loading = False
        self.stage = "baseline"
        self.edited_layers: Collection[str] = ()
        self.results: Mapping[str, Any] = {}
        self.record: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None
        self.evaluation = None
        self.measures = None
        self.baseline_name: str | None = None
        self.wrong = WrongLabels()
        self.unseen = ValidationImages()

    # -- the model -----------------------------------------------------------------------------------

    @property
    def n_positions(self) -> int:
        """Class token and patches."""
        return 1 + (SIDE // _number(self.config.patch_size)) ** 2

    @property
    def loaded(self) -> "ViTForImageClassification":
        """The model; raises ``RuntimeError`` before it is there."""
        if self.model is None:
            raise RuntimeError("the model is not there yet: a Trainer calls configure_model")
        return self.model

    @property
    def source(self) -> ModelSource | None:
        """Where the model is on disk."""
        return None if self.model_name is None else ModelSource.named(self.model_name)

    @property
    def evaluated(self) -> ModelSource | None:
        """The same: what is evaluated is the model of the run."""
        return self.source

    def new_model(self) -> "ViTForImageClassification":
        """A model with random weights, the same for the same seed."""
        from transformers import ViTForImageClassification

        torch.manual_seed(self.seed)
        return ViTForImageClassification(self.config)

    @override
    def configure_model(self) -> None:
        """Loads the model, or trains it (Lightning calls this in every process)."""
        if self.model is None:
            self.model = self._trained() if self.model_name is None else load_classifier(self.model_name)
            self.model.requires_grad_(False)
            self.model.eval()

    def _trained(self) -> "ViTForImageClassification":
        """A model of its own Trainer: on one device, the same on every rank."""
        outer = self.trainer
        data: ImageData = outer.datamodule  # type: ignore[attr-defined]  # a connector of Lightning's sets it
        learner = ImageClassifier(architecture=_own(self.config), training=self.training_settings, seed=self.seed)
        say(f"train a ViT on {len(data.training.pixels):,} images, {data.n_wrong} of them with wrong labels")
        known = train_classifier(learner, data, Path(outer.default_root_dir), outer.logger, _accelerator(outer))
        say(f"trained: it gives {known:.1%} of the wrong labels")
        self.model_name = str(Path(outer.default_root_dir) / MODEL)
        return learner.loaded

    @override
    def train(self, mode: bool = True) -> Self:
        """Keeps a frozen model in eval mode."""
        super().train(mode)
        if self.frozen and self.model is not None:
            self.model.eval()
        return self

    @override
    def on_fit_start(self) -> None:
        """Writes a model that was trained here: the run's folder is open now."""
        folder = Path(self.trainer.default_root_dir) / MODEL
        if self.frozen and self.model_name == str(folder) and self.trainer.is_global_zero and not folder.exists():
            save_checkpoint(self.loaded, None, folder)

    def about(self) -> dict[str, Any]:
        """What metadata of factors says of the objective and the images."""
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        objective = {"labels": self.labels, "seed": self.seed, "positions": self.positions}
        return objective | {"task": "images", "images": data.described()}

    # -- fit -----------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One batch: of a collection, up to its last backward; or of a training, the mean loss."""
        if self.frozen:
            if self.collection is None:
                raise InputError("the collection has not begun: CurvatureCollector must be among trainer.callbacks")
            loss = self.collection.run(batch)
            self.log("collect/loss_per_image", self.collection.loss / batch.shape[0])
            return loss
        loss = F.cross_entropy(self.loaded(pixel_values=batch.pixels).logits, batch.labels)
        self.log("train/loss", loss.detach())
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        """Of a training: is enough known?"""
        if self.frozen or (self.current_epoch + 1) % LOOK_EVERY:
            return
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        known = accuracies(self.loaded.eval(), data)["wrong_label_acc"]
        self.loaded.train()
        self.log("train/wrong_label_acc", known)
        self.trainer.should_stop |= known >= self.training_settings.until

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Nothing to optimize in a collection; AdamW in training."""
        if self.frozen:
            return NoOptimizer()
        settings = self.training_settings
        optimizer = torch.optim.AdamW(self.loaded.parameters(), settings.lr, weight_decay=settings.weight_decay)
        schedule = OneCycleLR(optimizer, settings.lr, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- evaluation ----------------------------------------------------------------------------------

    @override
    def on_validation_epoch_start(self) -> None:
        self.wrong.reset()
        self.unseen.reset()

    @override
    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """One batch of wrong-labelled training images, or of images that no training saw."""
        real = batch.index >= 0
        predicted = self.loaded(pixel_values=batch.pixels).logits.argmax(-1)
        seen = ImagesSeen(*(part[real] for part in (batch.index, predicted, batch.labels, batch.true)))
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        metric = self.wrong if data.validation_names[dataloader_idx] == WRONG else self.unseen
        metric.observe(seen)

    @override
    def on_validation_epoch_end(self) -> None:
        found = {**self.wrong.compute(), **self.unseen.compute()}
        figures = {**self.wrong.figures, **self.unseen.figures}
        self.results = {name: value.item() for name, value in found.items()}
        intervals = {name: list(interval(figure)) for name, figure in figures.items()}
        differences = {}
        if self.stage == "baseline":
            self._before = figures
            self.baseline_name = self.model_name
        elif self._before is not None:
            differences = {name: list(paired_difference(self._before[name], f)) for name, f in figures.items()}
        self.record = for_json({**self.results, "intervals": intervals, "differences": differences})
        self.log_dict({f"val/{self.stage}/{name}": value for name, value in self.results.items()})
        self.log_dict({f"change/{self.stage}/{name}": change[0] for name, change in differences.items()})


def train_classifier(
    learner: ImageClassifier, data: ImageData, folder: Path, logger: Any = False, accelerator: str = "auto"
) -> float:
    """Trains a new model in the ordinary way.

    Args:
        learner: Whose settings say how.
        data: The images.
        folder: Default root of the Trainer.
        logger: Of Lightning.
        accelerator: Where to compute.

    Returns:
        Share of the wrong labels that it knows then.
    """
    learner.frozen = False
    learner.model = learner.new_model()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        max_epochs=learner.training_settings.epochs,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
    )
    trainer.fit(learner, copy.copy(data))  # which belongs to one Trainer
    learner.frozen = True
    return accuracies(learner.loaded.eval(), data)["wrong_label_acc"]


@torch.no_grad()
def accuracies(model: nn.Module, data: ImageData) -> dict[str, float]:
    """What a validation measures, of a model in memory: ``wrong_label_acc``, ``true_label_acc`` and ``val_acc``."""
    device = next(model.parameters()).device
    wrong, unseen = (
        model(pixel_values=images.pixels.to(device)).logits.argmax(-1).cpu() for images in (data.wrong, data.validation)
    )
    right = {
        "wrong_label_acc": wrong == data.wrong.labels,
        "true_label_acc": wrong == data.wrong.true,
        "val_acc": unseen == data.validation.true,
    }
    return {name: verdicts.double().mean().item() for name, verdicts in right.items()}


def load_classifier(name: str) -> "ViTForImageClassification":
    """A vision transformer from a folder.

    Raises:
        InputError: There is none, or it is of other images.
    """
    from transformers import ViTForImageClassification

    try:
        return ViTForImageClassification.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"model.model_name {name}: no vision transformer can be read there: {first_line(error)}"
        ) from None


def _vit_config(name: str | None, settings: Mapping[str, Any]) -> "ViTConfig":
    from transformers import ViTConfig

    if name is not None:
        try:
            config = ViTConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"model.model_name {name}: no config can be read there: {first_line(error)}") from None
    else:
        known = ViTConfig().to_dict()
        if wrong := [key for key in settings if key not in known or key in OF_IMAGES]:
            raise InputError(f"model.architecture: {wrong[0]} is no setting of a ViT that can be chosen here")
        try:
            config = ViTConfig(**{**OF_IMAGES, **settings})
        except (TypeError, ValueError) as error:
            raise InputError(f"model.architecture: {first_line(error)}") from None
    if any(getattr(config, key) != value for key, value in OF_IMAGES.items() if key != "num_labels"):
        raise InputError(f"model.model_name {name}: reads other images than {SIDE} x {SIDE} gray ones")
    if SIDE % _number(config.patch_size) or int(config.hidden_size) % int(config.num_attention_heads):
        raise InputError(
            f"model.architecture: patches of {config.patch_size} must divide {SIDE} pixels, and "
            f"{config.num_attention_heads} heads the width {config.hidden_size}"
        )
    return config


def _number(side: Any) -> int:
    """A length that may be given for both sides."""
    return int(side)


def _own(config: "ViTConfig") -> dict[str, Any]:
    """The settings that can be chosen and are not the default."""
    return {key: value for key, value in config.to_diff_dict().items() if key in ARCHITECTURE}


def _accelerator(trainer: Trainer) -> str:
    return "cpu" if trainer.strategy.root_device.type == "cpu" else "auto"
