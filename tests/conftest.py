"""Fixtures of several rooms, and the order of the files. A process computes on one thread: two share two cores."""

import os
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gzip
import json
from collections.abc import Iterator

from lightning_kfac.garbage import imports

with imports():
    import pytest
    import torch
    import zstandard
    from filelock import FileLock
    from torch import nn

    from lightning_kfac import collect_factors, save_factors
    from lightning_kfac.assets import DEMO
    from lightning_kfac.models.fingerprint import weights_fingerprint
    from lightning_kfac.models.loading import load_model
    from tests.common import ARCHITECTURES, VOCAB, build_model, write_jsonl
    from tests.forks import ROOT, Forks, shared_forks

torch.set_num_threads(1)

# The files that take longest, in this order first: of two workers none is left with one of them at the end.
LONGEST = (
    "test_faults", "test_train", "test_sharded", "test_domains", "test_folders", "test_recitation", "test_mining",
    "test_circumstances", "test_crystallize", "test_fuzz", "test_feeding", "test_edit", "test_attack", "test_wheel",
    "test_ddp", "test_real_model",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the order of the files: pytest-xdist would begin with those that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files; tests of one file stay as they are."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports the test files without a look for garbage."""
    with imports():
        return (yield)


@pytest.fixture(scope="session")
def forks() -> Forks:
    """The server that forks runs of train.py and of modules."""
    return shared_forks()


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def any_model(request) -> nn.Module:
    """One of each of ``ARCHITECTURES``; tests must leave it unchanged."""
    return build_model(request.param)


@pytest.fixture(scope="session")
def demo_model() -> nn.Module:
    """The embedded model; tests must leave it unchanged."""
    return load_model("demo", "float32")


@pytest.fixture
def rows() -> list[list[int]]:
    """Rows of different lengths; token 0 is a real end-of-text token that shares the pad id."""
    generator = torch.Generator().manual_seed(1)
    lengths = [12, 7, 12, 3, 9, 12, 5]
    made = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    made[0][4] = made[4][8] = 0
    return made


@pytest.fixture(scope="session")
def demo_factors(demo_model, tmp_path_factory):
    """A factor folder of two small layers of the demo model; tests must leave it unchanged but for bases."""
    folder = tmp_path_factory.mktemp("factors") / "factors"
    batch = {"input_ids": torch.arange(1, 513).view(8, 64)}
    factors = collect_factors(demo_model, [batch], blocks=[3], projections=["gate", "up"])
    fingerprint = weights_fingerprint(demo_model, factors)
    save_factors(factors, folder, {"model": "demo", "fingerprint": fingerprint, "n_tokens": 504, "corpus": "numbers"})
    return folder


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """The main job as `make quickstart` runs it, in another folder; returns the folder and what was printed."""
    # One run for all workers of pytest-xdist, in the folder that theirs lie in.
    worker = tmp_path_factory.getbasetemp()
    shared = worker.parent if "PYTEST_XDIST_WORKER" in os.environ else worker
    folder, log = shared / "runs" / "quickstart", shared / "quickstart.log"
    with FileLock(shared / "quickstart.lock"):
        if not log.exists():
            command = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml"]
            done = subprocess.run(
                [*command, "--trainer.default_root_dir", str(folder)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, done.stdout
            log.write_text(done.stdout)
    return folder, log.read_text()


@pytest.fixture
def few(tmp_path):
    """The file of a memorized set: ten planted sequences."""
    lines = (DEMO / "planted_report.jsonl").read_text().splitlines()[:10]
    return write_jsonl(tmp_path / "few.jsonl", lines)


@pytest.fixture
def mixture(tmp_path):
    """A folder of shards whose columns and types differ, as in the OLMo-2 mixes; gzip and zstandard."""
    folder = tmp_path / "mix"
    (folder / "data" / "wiki").mkdir(parents=True)
    (folder / "data" / "math").mkdir()
    wiki = [{"id": str(i), "text": f"wiki {i}", "metadata": {"length": i}, "version": "v1"} for i in range(4)]
    math = [{"id": i, "text": f"math {i}", "attributes": {"s": [[0, 1, 0.5]]}, "metadata": "none"} for i in range(3)]
    math += [{"text": "math 3", "created": "2024-01-01", "metadata": {"other": True}}]
    with gzip.open(folder / "data" / "wiki" / "shard-0.json.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in wiki)
    packed = zstandard.compress("".join(json.dumps(row) + "\n" for row in math).encode())
    (folder / "data" / "math" / "shard-0.jsonl.zst").write_bytes(packed)
    return folder
