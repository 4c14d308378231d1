"""The data module of the image task: scikit-learn's handwritten digits, some of them with wrong labels."""

import importlib.util
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_kfac.collection.image_loss import ImageBatch, Positions
from lightning_kfac.data.loaders import FILLER, ShardedBatches
from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import IGNORED

# Loaders of a validation.
WRONG = "wrong labels"
VALIDATION = "validation"
CLASSES = 10
SIDE = 8
BRIGHTEST = 16


class Digits(NamedTuple):
    """Images with two labels each.

    Attributes:
        pixels: float32 [n, 1, 8, 8] in [0, 1].
        labels: int64 [n], those that a model is trained on.
        true: int64 [n].
    """

    pixels: Tensor
    labels: Tensor
    true: Tensor

    def take(self, places: Tensor) -> "Digits":
        """Some of them."""
        return Digits(*(part[places] for part in self))


class ImageData(LightningDataModule):
    """1,797 images of 8 x 8 pixels (``sklearn.datasets.load_digits``), of which some are kept for validation.

    A share of the others has a wrong label, drawn once: a model can only know it by heart.

    Args:
        wrong_labels: Share of the training images with a wrong label, more than 0 and less than 1.
        n_validation: Images that no training sees.
        batch_size: Images at once.
        seed: Draws validation images, wrong-labelled ones and their labels.

    Raises:
        InputError: Shares or numbers that cannot be, or scikit-learn is not installed.

    Attributes:
        training, validation: The images; the first ``n_wrong`` of ``training`` have wrong labels.

    Example:
        >>> data = ImageData(wrong_labels=0.1)  # doctest: +SKIP
        >>> data.n_wrong, len(data.training.pixels)  # doctest: +SKIP
        (144, 1437)
    """

    def __init__(self, wrong_labels: float = 0.1, n_validation: int = 360, batch_size: int = 128, seed: int = 0):
        super().__init__()
        if not 0 < wrong_labels < 1:
            raise InputError(f"data.wrong_labels is {wrong_labels}; it must lie between 0 and 1")
        for name, value in (("n_validation", n_validation), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"data.{name} is {value}; it must be at least 1")
        if importlib.util.find_spec("sklearn") is None:
            raise InputError("images need scikit-learn: pip install 'lightning-kfac[images]'")
        self.wrong_labels = wrong_labels
        self.n_validation = n_validation
        self.batch_size = batch_size
        self.seed = seed
        self.positions: Positions = "all"
        self.n_positions = 1
        self.training, self.validation = self._read()

    @property
    def n_wrong(self) -> int:
        """How many training images have a wrong label."""
        return max(1, round(self.wrong_labels * len(self.training.pixels)))

    @property
    def wrong(self) -> Digits:
        """The training images with a wrong label."""
        return self.training.take(torch.arange(self.n_wrong))

    def _read(self) -> tuple[Digits, Digits]:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels = torch.from_numpy(found.images).float()[:, None] / BRIGHTEST
        true = torch.from_numpy(found.target).long()
        if self.n_validation >= len(true):
            raise InputError(f"data.n_validation is {self.n_validation}, of {len(true)} images in all")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(true), generator=generator)
        whole = Digits(pixels, true, true)
        training = whole.take(order[self.n_validation :])
        n_wrong = max(1, round(self.wrong_labels * len(training.true)))
        others = torch.randint(1, CLASSES, (n_wrong,), generator=generator)
        labels = training.true.clone()
        labels[:n_wrong] = (labels[:n_wrong] + others) % CLASSES
        return training._replace(labels=labels), whole.take(order[: self.n_validation])

    # -- what reports ask ------------------------------------------------------------------------------

    tokenizer_fingerprint = None

    def described(self) -> dict[str, Any]:
        """What a figure depends on beside the model."""
        return {
            "images": "sklearn.datasets.load_digits",
            "wrong_labels": self.wrong_labels,
            "n_validation": self.n_validation,
            "data_seed": self.seed,
        }

    def hyperparameters(self) -> dict[str, Any]:
        """For TensorBoard."""
        return self.described()

    def measured(self) -> str:
        """Identifies what a validation measures."""
        return repr(sorted(self.described().items()))

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation loaders."""
        return [WRONG, VALIDATION]

    # -- Lightning -------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        module: Any = self._run.lightning_module
        self.positions = module.positions
        self.n_positions = module.n_positions

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Training images with the labels that they are trained on; shuffled for a training."""
        module: Any = self._run.lightning_module
        return self._loader(self.training, shuffle_seed=None if module.frozen else self.seed)

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Wrong-labelled training images, and images that no training saw."""
        return [self._loader(self.wrong), self._loader(self.validation)]

    @property
    def _run(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("the images have no Trainer yet: give them to trainer.fit or validate")
        return self.trainer

    def _loader(self, images: Digits, shuffle_seed: int | None = None) -> DataLoader[Any]:
        ranks = self._run.global_rank, self._run.world_size
        sampler = ShardedBatches(len(images.pixels), self.batch_size, *ranks, shuffle_seed)
        return DataLoader(Numbered(images), batch_sampler=sampler, collate_fn=self._batch)

    def _batch(self, rows: list[tuple[Tensor, ...]]) -> ImageBatch:
        pixels, labels, true, index = map(torch.stack, zip(*rows, strict=True))
        return ImageBatch(pixels, labels, true, index, self.n_positions, self.positions)

    @override
    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        return batch.to(device)


class Numbered(Dataset[tuple[Tensor, ...]]):
    """Images with both labels and their numbers; a filler has no label that counts."""

    def __init__(self, images: Digits):
        self.images = images

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        pixels, labels, true = (part[max(0, number)] for part in self.images)
        return pixels, labels if number != FILLER else torch.full_like(labels, IGNORED), true, torch.tensor(number)
