"""A task beside language modelling: one LightningModule and one data module behind the collector and the edit.

Rows of vectors are classified position by position. Nothing of it is a language model: no tokens, no vocabulary, no
head, no tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfac import EditConfig, InputError, load_factors
from lightning_kfac.callbacks import CurvatureCollector, EditCallback, SpectrumLogger
from lightning_kfac.modules.optimizers import NoOptimizer
from tests.common import relative_error

WIDTH, HIDDEN, CLASSES, POSITIONS, ROWS = 6, 10, 4, 5, 7


@dataclass(frozen=True)
class Signals:
    """Rows of vectors [B, T, d] with a class for each position, -1 where none counts."""

    vectors: Tensor
    classes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[0], self.vectors.shape[1]

    @property
    def counted(self) -> Tensor:
        return self.classes >= 0

    def split(self, rows: int) -> Iterator["Signals"]:
        for start in range(0, len(self.vectors), rows):
            yield Signals(self.vectors[start : start + rows], self.classes[start : start + rows])


class SignalObjective:
    """Summed cross-entropy against given classes."""

    mc_samples = 1

    def draws(self, model: nn.Module, batch: Signals, head_chunk: int | None) -> Iterator[Tensor]:
        logits = model(batch.vectors).flatten(0, 1)
        yield F.cross_entropy(logits, batch.classes.flatten(), ignore_index=-1, reduction="sum")

    def trial(self, positions: int, device: torch.device) -> Signals:
        zeros = torch.zeros(1, positions, WIDTH, device=device)
        return Signals(zeros, torch.zeros(1, positions, dtype=torch.long, device=device))

    def head(self, model, layers, device, positions) -> tuple[None, int]:
        return None, 4 * positions * CLASSES


class Network(nn.Module):
    """Two layers that read the same input, and one on top."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(WIDTH, HIDDEN)
        self.right = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.top = nn.Linear(HIDDEN, CLASSES)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.top(torch.tanh(self.left(vectors)) * self.right(vectors))


class Classifier(LightningModule):
    """The LightningModule of the task."""

    frozen = True
    skip_baseline = True
    model_name = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model = Network().requires_grad_(False).eval()
        self.objective = SignalObjective()
        self.collection = None
        self.stage = "baseline"
        self.results = {}
        self.edited_layers = ()
        self.strict_loading = False

    def about(self) -> dict:
        return {"labels": "gold"}

    def training_step(self, batch: Signals, batch_idx: int) -> Tensor:
        return self.collection.run(batch)

    def configure_optimizers(self) -> NoOptimizer:
        return NoOptimizer()


class SignalData(LightningDataModule):
    """The data module of the task: one text, if it can be called that."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.vectors = torch.randn(ROWS, POSITIONS, WIDTH, generator=generator)
        self.classes = torch.randint(0, CLASSES, (ROWS, POSITIONS), generator=generator)
        self.classes[2, 3:] = -1

    def train_dataloader(self) -> DataLoader:
        rows = list(zip(self.vectors, self.classes, strict=True))
        return DataLoader(rows, 3, collate_fn=lambda some: Signals(*map(torch.stack, zip(*some, strict=True))))

    def transfer_batch_to_device(self, batch: Signals, device: torch.device, dataloader_idx: int) -> Signals:
        return Signals(batch.vectors.to(device), batch.classes.to(device))


def fit(folder, *callbacks):
    module = Classifier()
    data = SignalData()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module, data


def expected_factors(data: SignalData) -> dict:
    """A and G of each layer by autograd in float64, one position at a time."""
    model = Classifier().model.double()
    sums, count = {}, 0
    for row, classes in zip(data.vectors.double(), data.classes, strict=True):
        for vector, label in zip(row, classes, strict=True):
            if label < 0:
                continue
            left = model.left(vector).requires_grad_()
            right = model.right(vector).requires_grad_()
            hidden = torch.tanh(left) * right
            top = model.top(hidden)
            gradients = torch.autograd.grad(F.cross_entropy(top, label), [left, right, top])
            count += 1
            inputs = {"left": vector, "right": vector, "top": hidden.detach()}
            for (name, a), g in zip(inputs.items(), gradients, strict=True):
                A, G = sums.get(name, (0, 0))
                sums[name] = A + torch.outer(a, a), G + torch.outer(g, g)
    return {name: (A / count, G / count, count) for name, (A, G) in sums.items()}


def test_factors_of_another_task(tmp_path):
    collector = CurvatureCollector(modules=["left", "right", "top"])
    _, data = fit(tmp_path, collector)
    stored = load_factors(tmp_path / "factors")
    for name, (A, G, count) in expected_factors(data).items():
        for factors in (collector.factors, stored):
            assert factors[name].n_tokens == count
            assert relative_error(factors[name].A, A) < 1e-6 and relative_error(factors[name].G, G) < 1e-6
    assert collector.plan.leaders == {"left": "left", "right": "left", "top": "top"}
    assert collector.factors["left"].A is collector.factors["right"].A
    assert (stored.metadata["labels"], stored.metadata["corpus"]) == ("gold", None)


def test_an_edit_of_another_task(tmp_path):
    edit = EditCallback(EditConfig(rho=0.5), save="patch")
    module, _ = fit(tmp_path, CurvatureCollector(modules=["left", "top"]), edit)
    before = Classifier().model
    changed = {name for name, p in module.model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {"left.weight", "top.weight"} and module.stage == "edited"
    assert all(layer.mass_kept >= 0.5 for layer in edit.report.layers)
    assert (tmp_path / "patch" / "patch.safetensors").exists()


def test_wrong_order_of_callbacks(tmp_path):
    for callback in (EditCallback(EditConfig()), SpectrumLogger()):
        name = type(callback).__name__
        with pytest.raises(InputError, match=rf"{name} needs a CurvatureCollector before it in trainer\.callbacks"):
            fit(tmp_path, callback, CurvatureCollector(modules=["left"]))
