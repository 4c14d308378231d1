"""Shared models and data. Each process computes on one thread: two of them share two cores here."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import collect_factors, save_factors
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import load_model
from tests.forks import Forks

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
VOCAB = 61
ARCHITECTURES = {
    "olmo2": {
        "model_type": "olmo2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "llama": {  # grouped-query attention
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3": {  # a head width of its own
        "model_type": "qwen3",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 64, "n_inner": 40},
}
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


# The files that take longest, first: of two workers none is left with one of them at the end.
LONGEST = ("test_cli", "test_faults", "test_sharded", "test_domains", "test_crystallize", "test_mining", "test_ddp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files; tests of one file stay as they are."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def build_model(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A small model with weights large enough that its predictions are not uniform."""
    settings = ARCHITECTURES[family] | COMMON | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    torch.set_rng_state(generator_state)
    return model.to(dtype)


_forks: list[Forks] = []


@pytest.fixture(scope="session")
def forks():
    """Runs of train.py in processes of their own."""
    _forks or _forks.append(Forks())
    yield _forks[0]
    _forks.pop().close()


def run_train(arguments: list[str]) -> None:
    """train.py in as many processes as it asks for devices; it must succeed."""
    _forks or _forks.append(Forks())
    options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    n, strategy = int(options.get("--trainer.devices", 1)), options.get("--trainer.strategy", "ddp")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        ended = _forks[0].ranks(arguments, log, n, strategy=strategy) if n > 1 else [_forks[0].run(arguments, log)]
    for code, said in ended:
        assert code == 0, said


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def any_model(request) -> nn.Module:
    """OLMo-2, Llama with grouped-query attention, GPT-2; tests must leave it unchanged."""
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
