"""Files in kronfluence's layout, and kronfluence itself where it is installed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lightning_kfac import KroneckerFactors, collect_factors
from lightning_kfac.factors.foreign.read import read_foreign
from tests.common import assert_same, batched, build_model, padded
from tests.factors.foreign.common import EYE, N, assert_equal, write_kronfluence


@pytest.mark.parametrize("bias", [False, True])
def test_kronfluence(tmp_path, samples, expected, bias):
    write_kronfluence(tmp_path, samples, bias, metadata={"use_empirical_fisher": "True"})
    found, metadata = read_foreign(tmp_path)
    assert_equal(found, expected)
    assert metadata["imported_from"] == "kronfluence" and metadata["notes"].startswith("labels: gold")


def test_kronfluence_counts_positions_without_a_loss(tmp_path, samples, expected):
    write_kronfluence(tmp_path, samples, extra_positions=4)
    assert_equal(read_foreign(tmp_path, n_tokens=N)[0], expected)
    smaller, metadata = read_foreign(tmp_path)
    for name, layer in smaller.items():
        assert layer.n_tokens == N + 4
        torch.testing.assert_close(layer.G * (N + 4) / N, expected[name].G)
    assert metadata["notes"].startswith("labels: unknown")


@pytest.mark.parametrize(("size", "error", "kept"), [(7, 1e-4, 6), (8, 1e-4, 8), (8, 0, 7), (7, 0.1, 7)])
def test_a_bias_is_recognised_in_long_sums(tmp_path, size, error, kept):
    """float32 does not add up 20 million ones exactly; layers of even width leave an odd size."""
    count = 20_000_000
    A = torch.full((size,), 2.0 * count).diag()
    A[-1, -1] = count * (1 + error)
    for part, matrix in (("activation", A), ("gradient", EYE)):
        save_file({"fc": matrix}, tmp_path / f"{part}_covariance.safetensors")
        save_file({"fc": torch.tensor([count])}, tmp_path / f"num_{part}_covariance_processed.safetensors")
    assert read_foreign(tmp_path)[0]["fc"].shape == (3, kept)


def fit_with_kronfluence(folder, model, batches, names, loss, mask=None):
    """Fits covariances with the package and returns the folder it wrote."""
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class SummedLoss(Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            return loss(model, batch)

        def compute_measurement(self, batch, model):
            return loss(model, batch)

        def get_influence_tracked_modules(self):
            return names

        def get_attention_mask(self, batch):
            return mask(batch) if mask else None

    task = SummedLoss()
    analyzer = Analyzer("run", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder))
    arguments = FactorArguments(strategy="kfac", use_empirical_fisher=True)
    analyzer.fit_covariance_matrices("f", batches, per_device_batch_size=2, factor_args=arguments)
    return folder / "run" / "factors_f"


class Rows(torch.utils.data.Dataset):
    """The rows of one batch as a data set."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index):
        return {key: values[index] for key, values in self.batch.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mask_is", ["valid", "attended"])
def test_kronfluence_itself_on_a_language_model(tmp_path, rows, side, mask_is):
    pytest.importorskip("kronfluence")
    batch = padded(rows, side)
    attended = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(attended == 0, -100)
    batch["labels"] = labels
    batch["positions"] = (attended.cumsum(1) - 1).clamp(min=0)
    batch["valid"] = F.pad(labels[:, 1:] != -100, (0, 1)).long() * attended

    def loss(model, batch):
        out = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["positions"]
        )
        targets = batch["labels"][:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
        return F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")

    expected = collect_factors(build_model("olmo2"), batched(rows, 3, side), labels="gold")
    n = next(iter(expected.values())).n_tokens
    key = "valid" if mask_is == "valid" else "attention_mask"
    path = fit_with_kronfluence(
        tmp_path, build_model("olmo2"), Rows(batch), list(expected), loss, lambda batch: batch[key]
    )
    found, metadata = read_foreign(path, n_tokens=None if mask_is == "valid" else n)
    assert metadata["imported_from"] == "kronfluence" and metadata["notes"].startswith("labels: gold")
    if mask_is == "attended":  # its A then also holds the last position of each row
        found = {name: KroneckerFactors(expected[name].A, f.G, f.n_tokens) for name, f in found.items()}
    assert_same(found, expected)


def test_kronfluence_itself_with_a_bias(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")

    expected = collect_factors(model, [{"x": x, "y": y}], modules=[r"\d"], loss_fn=loss)
    path = fit_with_kronfluence(tmp_path, model, Rows({"x": x, "y": y}), ["0", "2"], loss)
    assert_same(read_foreign(path)[0], expected)
    assert expected["0"].shape == (5, 6) and expected["2"].shape == (3, 5)
