"""Other tools' factor files, written here in their layouts, against factors that are known."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lightning_kfac import InputError, KFACEditor, KroneckerFactors, collect_factors, load_factors, save_factors
from lightning_kfac.factors.foreign.read import read_foreign
from tests.common import assert_same, batched, build_model, padded

LAYERS = {"gate": "model.layers.2.mlp.gate_proj", "up": "model.layers.2.mlp.up_proj"}
N = 30


def moment(rows):
    return rows.T @ rows


@pytest.fixture
def samples():
    """Inputs [N, 6] that gate and up share, output gradients [N, 5] of each."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(N, 6, generator=generator)
    return a, {projection: torch.randn(N, 5, generator=generator) for projection in LAYERS}


@pytest.fixture
def expected(samples):
    a, gradients = samples
    a = a.double()
    return {
        LAYERS[p]: KroneckerFactors((moment(a) / N).float(), (moment(g.double()) / N).float(), N)
        for p, g in gradients.items()
    }


def write_original(path, expected, part=slice(None)):
    """The file of some layers; every layer has a tensor A of its own."""
    entries = {
        f"blk2.{p}": {"A": expected[name].A.clone(), "G": expected[name].G, "n_tokens": N} for p, name in LAYERS.items()
    }
    torch.save(dict(list(entries.items())[part]), path)


def write_replication(path, expected):
    torch.save({f"layer_2.{p}_proj": (expected[n].A.clone(), expected[n].G) for p, n in LAYERS.items()}, path)


def write_kronfluence(folder, samples, bias=False, extra_positions=0, metadata=None):
    """Sums and counts; with a bias a column of ones; positions without a loss add zero gradients to G."""
    a, gradients = samples
    count = N + extra_positions
    if bias:
        a = torch.cat([a, torch.ones(N, 1)], dim=1)
    tensors = {
        "activation_covariance": {name: moment(a) for name in LAYERS.values()},
        "gradient_covariance": {LAYERS[p]: moment(g) for p, g in gradients.items()},
        "num_activation_covariance_processed": {name: torch.tensor([N]) for name in LAYERS.values()},
        "num_gradient_covariance_processed": {name: torch.tensor([count]) for name in LAYERS.values()},
    }
    folder.mkdir(exist_ok=True)
    for name, contents in tensors.items():
        save_file(contents, folder / f"{name}.safetensors", metadata=metadata)


def write_bergson(folder, samples, ranks=1, bias=False, config=None, count=N):
    """Rows over the ranks, rank 0 with the remainder; names as inside the base model."""
    a, gradients = samples
    if bias:
        a = torch.cat([a, torch.ones(N, 1)], dim=1)
    sums = {
        "activation_sharded": {name: moment(a) for name in LAYERS.values()},
        "gradient_sharded": {LAYERS[p]: moment(g) for p, g in gradients.items()},
    }
    for part, matrices in sums.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            shard = {}
            for name, matrix in matrices.items():
                base, rest = divmod(len(matrix), ranks)
                start = rank * base + (rest if rank else 0)
                stop = (rank + 1) * base + rest
                shard[name.removeprefix("model.")] = matrix[start:stop].contiguous()
            save_file(shard, folder / part / f"shard_{rank}.safetensors")
    if count:
        torch.save(torch.tensor(count), folder / "total_processed.pt")
    if config:
        (folder / "config.yaml").write_text(config)


def assert_equal(found, expected):
    assert_same(found, expected, 1e-6)
    for layer in found.values():
        assert layer.A.dtype == layer.G.dtype == torch.float32
        assert torch.equal(layer.A, layer.A.T) and torch.equal(layer.G, layer.G.T)
    first, second = found.values()
    assert first.A is second.A


# -- each layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "original"])
def test_original(tmp_path, expected, kind):
    write_original(tmp_path / "kfac_factors_blk_2.pt", expected)
    found, metadata = read_foreign(tmp_path / "kfac_factors_blk_2.pt", kind)
    assert_equal(found, expected)
    assert metadata["imported_from"] == "original" and metadata["source"] == str(tmp_path / "kfac_factors_blk_2.pt")
    assert "labels" in metadata["notes"] and "square" in metadata["notes"]


def test_original_folder(tmp_path, expected):
    write_original(tmp_path / "kfac_factors_blk_2.pt", expected, slice(0, 1))
    write_original(tmp_path / "kfac_factors_blk_2_3.pt", expected, slice(1, 2))
    (tmp_path / "meta_blk_2.json").write_text("{}")
    assert_equal(read_foreign(tmp_path, n_tokens=N)[0], expected)
    write_original(tmp_path / "kfac_factors_blk_9.pt", expected)
    with pytest.raises(InputError, match=r"gate_proj occurs twice"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("n_tokens", [None, N])
def test_replication(tmp_path, expected, n_tokens):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    expected = {name: KroneckerFactors(f.A, f.G, n_tokens or 0) for name, f in expected.items()}
    for path in (tmp_path, tmp_path / "kfac_statistics.pt"):
        found, metadata = read_foreign(path, n_tokens=n_tokens)
        assert_equal(found, expected)
        assert metadata["imported_from"] == "replication" and "token count" in metadata["notes"]


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bergson(tmp_path, samples, expected, ranks, bias):
    config = "steps:\n- hessian:\n    hessian_cfg: {method: kfac, use_dataset_labels: false}\n"
    config += "    index_cfg: {loss_reduction: sum}\nmetadata: {}\n"
    write_bergson(tmp_path, samples, ranks, bias, config)
    found, metadata = read_foreign(tmp_path)
    assert_equal(found, expected)
    assert metadata["imported_from"] == "bergson"
    assert metadata["notes"].startswith("labels: sampled; method: kfac; loss_reduction: sum")


def test_bergson_without_a_count_needs_one(tmp_path, samples, expected):
    write_bergson(tmp_path, samples, 2, count=None)
    with pytest.raises(InputError, match=r"no total_processed\.pt; the factors are sums, so give n_tokens"):
        read_foreign(tmp_path)
    found, metadata = read_foreign(tmp_path, n_tokens=N)
    assert_equal(found, expected)
    assert metadata["notes"].startswith("labels: unknown; method: unknown")


def test_layer_names_of_other_families(tmp_path, samples, expected):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    found, _ = read_foreign(tmp_path, layer_pattern="transformer.h.{block}.ffn.{projection}")
    assert list(found) == ["transformer.h.2.ffn.gate", "transformer.h.2.ffn.up"]
    write_bergson(tmp_path / "b", samples)
    found, _ = read_foreign(tmp_path / "b", layer_pattern="transformer.h.{block}.mlp.{projection}")
    assert list(found) == ["transformer.layers.2.mlp.gate_proj", "transformer.layers.2.mlp.up_proj"]


def test_low_precision_sums_are_made_symmetric(tmp_path, expected):
    A = next(iter(expected.values())).A
    wobbly = A + 1e-4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"layer_0.up_proj": (wobbly, A.bfloat16())}, tmp_path / "kfac_statistics.pt")
    (layer,) = read_foreign(tmp_path)[0].values()
    torch.testing.assert_close(layer.A, (wobbly + wobbly.T) / 2)
    assert torch.equal(layer.G, A.bfloat16().float())


def test_imported_factors_are_saved_and_edit_a_model(tmp_path, rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3))
    by_block = {
        f"layer_{name.split('.')[2]}.{name.rpartition('.')[2]}": (f.A.clone(), f.G) for name, f in factors.items()
    }
    torch.save(by_block, tmp_path / "kfac_statistics.pt")
    found, metadata = read_foreign(tmp_path, n_tokens=53)
    assert_same(found, factors, 1e-7)
    save_factors(found, tmp_path / "factors", metadata)
    loaded = load_factors(tmp_path / "factors")
    assert loaded.metadata["imported_from"] == "replication"
    assert loaded.shared_A("model.layers.0.mlp.gate_proj") == loaded.shared_A("model.layers.0.mlp.up_proj")
    assert KFACEditor(model, loaded).apply().fraction_kept < 1


# -- what is refused ---------------------------------------------------------------------------------------


def save_pt(folder, contents, name="kfac_statistics.pt"):
    torch.save(contents, folder / name)
    return folder / name


EYE = torch.eye(3)
NAN = torch.full((3, 3), float("nan"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"layer_0.up_proj": (EYE, torch.ones(3, 2))}, r"layer_0.up_proj: G has shape \[3, 2\], it must be square"),
        ({"layer_0.up_proj": (torch.ones(0, 0), EYE)}, r"A has shape \[0, 0\]"),
        ({"layer_0.up_proj": (EYE.triu() + torch.ones(3, 3).triu(), EYE)}, "not symmetric"),
        ({"layer_0.up_proj": (-EYE, EYE)}, "negative on the diagonal"),
        ({"layer_0.up_proj": (NAN, EYE)}, "not finite"),
        ({"layer_0.up_proj": (EYE.long(), EYE)}, "not a dense tensor of real numbers"),
        ({"layer_0.up_proj": (EYE.to_sparse(), EYE)}, "not a dense tensor of real numbers"),
        ({"layer_0.up_proj": EYE}, r"not a pair \(A, G\)"),
        ({"layer_0.up_proj": (EYE, EYE), "step": 3}, r"key 'step' is not one of the replication layout"),
        ({"blk0.up": {"A": EYE, "G": EYE}}, "blk0.up is not a dict of A, G and n_tokens"),
        ({"blk0.up": (EYE, EYE)}, "blk0.up is not a dict of A, G and n_tokens"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 0}}, "must be a positive whole number"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 2.5}}, "must be a positive whole number"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 7}}, "n_tokens is 7, not 10; leave n_tokens out"),
        ({"weight": EYE}, "none of the known layouts .original:.*replication:.*kronfluence:.*bergson:"),
        ({}, "none of the known layouts"),
        ([EYE], "holds a list, not a dict"),
    ],
)
def test_wrong_contents(tmp_path, contents, message):
    path = save_pt(tmp_path, contents)
    with pytest.raises(InputError, match=message) as caught:
        read_foreign(path, n_tokens=10)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Arbitrary:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_of_anything_else_are_refused(tmp_path, capsys):
    path = tmp_path / "kfac_statistics.pt"
    torch.save({"layer_0.up_proj": Arbitrary()}, path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"layer_0.up_proj": Arbitrary()}, protocol=2))
    for bad in (path, tmp_path / "plain.pt"):
        with pytest.raises(InputError, match="damaged or holds more than tensors"):
            read_foreign(bad)
    assert "executed" not in capsys.readouterr().out


def test_damaged_files(tmp_path, samples, expected):
    path = tmp_path / "kfac_statistics.pt"
    write_replication(path, expected)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="damaged"):
        read_foreign(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        read_foreign(tmp_path, "replication")
    write_kronfluence(tmp_path / "k", samples)
    file = tmp_path / "k" / "gradient_covariance.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"gradient_covariance.safetensors: cannot be read"):
        read_foreign(tmp_path / "k")
    save_file({"other": EYE}, file)
    with pytest.raises(InputError, match=r"gradient_covariance.safetensors: cannot be read \(.*gate_proj"):
        read_foreign(tmp_path / "k")
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_foreign(tmp_path / "k")


def test_damaged_bergson_runs(tmp_path, samples):
    write_bergson(tmp_path, samples, 3)
    (tmp_path / "activation_sharded" / "shard_2.safetensors").unlink()
    with pytest.raises(InputError, match=r"A has shape \[4, 6\], it must be square; is a shard missing"):
        read_foreign(tmp_path)
    (tmp_path / "gradient_sharded" / "shard_0.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_foreign(tmp_path)
    narrow = {name.removeprefix("model."): EYE.clone() for name in LAYERS.values()}
    save_file(narrow, tmp_path / "activation_sharded" / "shard_1.safetensors")
    with pytest.raises(InputError, match="do not fit together"):
        read_foreign(tmp_path)
    write_bergson(tmp_path / "b", samples, config="steps:\n- hessian: {hessian_cfg: {method: tkfac}, index_cfg: {}}\n")
    with pytest.raises(InputError, match="method tkfac gives no K-FAC factors"):
        read_foreign(tmp_path / "b")
    (tmp_path / "b" / "config.yaml").write_text("steps: [")
    with pytest.raises(InputError, match=r"config.yaml: cannot be read"):
        read_foreign(tmp_path / "b")
    (tmp_path / "b" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"total_processed.pt is 30, not 31"):
        read_foreign(tmp_path / "b", n_tokens=31)


def test_wrong_arguments(tmp_path, expected):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("A")
    for path, options, message in [
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "none of the known layouts"),
        (tmp_path / "notes.txt", {}, "none of the known layouts"),
        (tmp_path / "empty", {"kind": "original"}, "holds no layer"),
        (tmp_path, {"kind": "kronfluence"}, "activation_covariance.safetensors: cannot be read"),
        (tmp_path, {"kind": "bergson"}, "give n_tokens"),
        (tmp_path / "kfac_statistics.pt", {"kind": "original"}, "not one of the original layout"),
        (tmp_path / "kfac_statistics.pt", {"kind": "kronfluence"}, "cannot be read"),
        (tmp_path, {"kind": "curvlinops"}, "choose auto, original, replication, kronfluence, bergson"),
        (tmp_path, {"n_tokens": 0}, "must be positive"),
        (tmp_path, {"layer_pattern": "model.{block}"}, r"lacks \{block\} or \{projection\}"),
    ]:
        with pytest.raises(InputError, match=message):
            read_foreign(path, **options)
    (tmp_path / "empty" / "activation_covariance_data_partition0_module_partition0.safetensors").touch()
    with pytest.raises(InputError, match="aggregate_covariance_matrices"):
        read_foreign(tmp_path / "empty")


# -- the real kronfluence ----------------------------------------------------------------------------------


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
