"""Factors that are known, and how other tools write them."""

import torch
from safetensors.torch import save_file

from tests.common import assert_same

LAYERS = {"gate": "model.layers.2.mlp.gate_proj", "up": "model.layers.2.mlp.up_proj"}
N = 30


def moment(rows):
    return rows.T @ rows


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


EYE = torch.eye(3)
