"""Models of pipes, devices, and links to elsewhere."""

import json
import os
import shutil
import socket

import pytest

from lightning_kfac.assets import DEMO
from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_config, load_model, load_tokenizer
from lightning_kfac.models.adapters import check_adapter
from lightning_kfac.models.model_folder import check_model_folder
from tests.storage.test_fuzz import within

FILES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja",
         "other.safetensors", "tokenizer.model")  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model")


def refused(call, *args):
    with within(20), pytest.raises(InputError) as stopped:
        call(*args)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(path.parent)  # its names are short
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


KINDS = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": make_socket,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_waits_for_ever_is_named(model, name, kind):
    """``model.safetensors`` is looked for as a file, and another is taken where it is none: all are looked at."""
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    for load in (load_config, load_model, load_tokenizer):
        assert f"{model / name}: {kind}, not a file" in refused(load, str(model))


def test_in_a_folder_of_chat_templates_too(model):
    (model / "chat_templates").mkdir()
    os.mkfifo(model / "chat_templates" / "x.jinja")
    assert "x.jinja: a pipe, not a file" in refused(load_tokenizer, str(model))


def test_an_adapter_of_pipes(tmp_path):
    pytest.importorskip("peft")
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_model.safetensors: a pipe, not a file" in refused(check_adapter, str(tmp_path))


@pytest.mark.parametrize("name", ["../outside/w.safetensors", "/etc/passwd", "sub/w.safetensors", "..", "", 7])
def test_an_index_names_files_of_its_folder(model, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (model / "sub").mkdir()
    for place in (tmp_path / "outside", model / "sub", model):  # a file of the name within does not help
        shutil.copy(model / "model.safetensors", place / "w.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused(load_model, str(model))
    assert "model.safetensors.index.json: damaged or incomplete: " in said and "is not the name of a file" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_stay_in_the_folder(model, tmp_path, name, absolute):
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name if absolute else f"../{name}")
    for load in (load_config, load_model, load_tokenizer):
        assert f"{model / name}: a link out of the model's folder, to {tmp_path / name}" in refused(load, str(model))
    (model / name).unlink()
    (tmp_path / name).rename(model / f"own_{name}")
    (model / name).symlink_to(f"own_{name}")
    check_model_folder(model)


def test_a_link_to_itself_or_to_nothing(model):
    (model / "loop.json").symlink_to("loop.json")
    (model / "gone.json").symlink_to("nothing.json")  # within the folder: transformers finds no such file
    said = ""
    try:
        check_model_folder(model)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    (model / "loop.json").unlink()
    check_model_folder(model)


@pytest.mark.parametrize("shared", [False, True])
def test_the_layout_of_the_hub_s_cache(model, tmp_path, shared):
    """Snapshots of links to blobs; newer versions link these to blobs that all repositories share."""
    repository = tmp_path / "hub" / "models--me--demo"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", tmp_path / "hub" / "blobs" / "ab"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in model.iterdir() if path.is_file())):
        blob = repository / "blobs" / f"{number:040}"
        if shared:
            shutil.copy(file, tmp_path / "hub" / "blobs" / "ab" / f"{number:064}")
            blob.symlink_to(f"../../blobs/ab/{number:064}")
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    assert load_model(str(snapshot)).config.num_hidden_layers == load_config("demo").num_hidden_layers
    load_tokenizer(str(snapshot))
    (tmp_path / "link").symlink_to(snapshot)  # of the folder itself
    load_config(str(tmp_path / "link"))
    (snapshot / "extra.json").symlink_to("../../../models--other--one/x.json")
    assert "a link out of the model's folder" in refused(load_config, str(snapshot))


def test_a_gguf_file_of_another_folder(model, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for name in ("../x.gguf", str(tmp_path / "x.gguf")):
        with pytest.raises(InputError, match=r"leads out of the model's folder"):
            load_config(str(model), gguf_file=name)


def test_a_config_larger_than_any(model):
    (model / "config.json").write_text(" " * (1 << 24) + "{}")
    assert "config.json: too large for a config (16,777,218 bytes)" in refused(load_config, str(model))
