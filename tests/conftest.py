"""Shared models and data. Each process computes on one thread: two of them share two cores here."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import collect_factors, save_factors
from lightning_kfac.fingerprint import weights_fingerprint
from lightning_kfac.loading import load_model

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


def run_train(arguments: list[str]) -> None:
    """train.py in a process of its own, as ranks need it; it must succeed."""
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
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
    return folder, done.stdout
