"""Absurd sizes in a config end in one line, before anything is built."""

import json
import shutil

import pytest
from transformers import CONFIG_MAPPING

from lightning_kfac.assets import DEMO
from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_config, load_model
from lightning_kfac.models import loading
from lightning_kfac.models.loading import check_stored
from lightning_kfac.models.sizes import check_sizes
from lightning_kfac.models.source import ModelSource
from lightning_kfac.planning.architecture import published_config
from lightning_kfac.planning.shapes import SHAPES
from tests.storage.test_fuzz import within

ABSURD = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 2,000"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers is a number of more than 20 digits; at most"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1; no causal language model has less than 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; no causal language model has less than 1"),
    ({"hidden_size": 10**9, "num_attention_heads": 1}, "hidden_size is 1000000000; at most 268,435,456"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000; at most"),
    ({"vocab_size": 0}, "vocab_size is 0; no causal language model has less than 1"),
    ({"intermediate_size": -7}, "intermediate_size is -7; no causal language model has less than 1"),
    ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000; at most 1,048,576"),
    ({"num_labels": 10**9}, "num_labels is 1000000000; at most"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000; at most"),
    ({"parts": [{"n_layer": 10**9}]}, "n_layer is 1000000000; at most"),
    ({"depths": [2, 10**9]}, "depths is 1000000000; at most"),
]
# What transformers or torch notice themselves.
WRONG = [
    {"num_attention_heads": 0},
    {"num_hidden_layers": "6"},
    {"num_hidden_layers": [6]},
    {"num_hidden_layers": None},
    {"num_hidden_layers": 2.5},
    {"vocab_size": [2048]},
    {"vocab_size": {}},
    {"hidden_size": 1e300},
    {"hidden_size": True},
    {"num_key_value_heads": 0},
    {"intermediate_size": 1 << 28, "hidden_size": 1 << 28},
    {"rope_parameters": 7},
]


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model")


def settings(folder, changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("changes", "said"), ABSURD)
def test_absurd_sizes_are_named(model, monkeypatch, changes, said):
    """By every way to a config; no class of transformers sees the number."""
    settings(model, changes)
    monkeypatch.setattr(loading, "AutoConfig", None)
    for read in (load_config, load_model):
        with within(20), pytest.raises(InputError) as stopped:
            read(str(model))
        assert said in str(stopped.value) and str(model) in str(stopped.value)
    with pytest.raises(InputError) as stopped:
        load_model(None, architecture={"model_type": "llama"} | changes)
    assert str(stopped.value).startswith("model.architecture: ") and said in str(stopped.value)


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_types_are_one_line_too(model, changes):
    settings(model, changes)
    for read in (
        load_model,
        lambda name: check_stored(ModelSource(name), load_config(name)),
    ):
        with within(60), pytest.raises(InputError) as stopped:
            read(str(model))
        assert "\n" not in str(stopped.value)


def test_many_experts_of_many_layers():
    check_sizes({"num_hidden_layers": 94, "num_experts": 384}, "x")
    with pytest.raises(InputError, match=r"100,000 experts in each of 1,000 layers"):
        check_sizes({"num_hidden_layers": 1000, "moe": {"num_local_experts": 100_000}}, "x")


def test_every_known_config_passes():
    """The defaults of every family of transformers, and the shapes that plans know."""
    seen = 0
    for family in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[family]().to_dict()
        except Exception:  # some need parts, or other packages
            continue
        check_sizes(config, family)
        seen += 1
    assert seen > 200
    for shape in SHAPES:
        check_sizes(published_config(shape).to_dict(), shape)


def test_more_parameters_than_the_files_have_bytes(model):
    """Weights that are missing would be made up, and take memory: 2,000 blocks for the files of 6."""
    settings(model, {"num_hidden_layers": 2000})
    with within(120), pytest.raises(InputError, match=r"config.json describes [\d,]+ parameters, its files of weights"):
        load_model(str(model))


def test_random_weights_larger_than_the_machine():
    size = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 100, "vocab_size": 1000}
    with within(60), pytest.raises(InputError, match=r"its weights take [\d,]+ GB, and this machine has [\d,]+ GB"):
        load_model(None, architecture={"model_type": "llama", "num_attention_heads": 64} | size)
