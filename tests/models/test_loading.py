"""Models and tokenizers as people have them: what loads, and what is refused in one sentence."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_config, load_model, load_tokenizer
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.source import ModelSource
from tests.common import build_model, tiny_hub

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
BART = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 61}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "model"
    build_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stored, tmp_path / "model")


def settings(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(call, *args, **keywords):
    """The one line of an ``InputError``."""
    with pytest.raises(InputError) as stopped:
        call(*args, **keywords)
    text = str(stopped.value)
    assert "\n" not in text and len(text) < 600, text
    return text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 48}, r"model.layers.0.mlp.gate_proj.weight is [40, 24] in its file, [48, 24] by config"),
        ({"num_hidden_layers": 4}, "weights are not in the checkpoint, first model.layers.3."),
        ({"model_type": ...}, "Should have a `model_type` key"),
        ({"model_type": "frobnicate"}, "`frobnicate`"),
        ({"hidden_size": "many"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"hidden_act": "frob"}, "KeyError: 'frob'"),
        ({"dtype": "float99"}, "float99"),
        ({"dtype": "int8"}, "not a floating-point dtype"),
        ({"auto_map": {"AutoConfig": "configuration_x.X"}, "model_type": "x"}, "trust_remote_code"),
    ],
)
def test_wrong_configs_are_one_sentence(folder, changes, said):
    settings(folder, **changes)
    assert said in refused(load_model, str(folder))


def test_a_config_of_fewer_layers_is_said(folder, capsys):
    settings(folder, num_hidden_layers=2)
    load_model(str(folder))
    said = " ".join(capsys.readouterr().err.split()) + " ".join(capsys.readouterr().out.split())
    assert "9 weights" in said and "first model.layers.2." in said


@pytest.mark.parametrize("text", ["[]", "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), ""])
def test_configs_that_are_none(folder, text):
    (folder / "config.json").write_text(text, "latin-1")
    assert str(folder) in refused(load_config, str(folder))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "bitsandbytes", "of tomorrow"])
def test_quantized_checkpoints_are_refused_by_name(folder, method):
    settings(folder, quantization_config={"quant_method": method, "bits": 4})
    said = refused(load_config, str(folder))
    assert f"quantized ({method})" in said and "dequantize it first" in said


def test_packed_weights_whose_config_says_nothing_are_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.qweight"] = torch.zeros(3, 40, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.qweight is I32" in refused(load_config, str(folder))
    settings(folder, quantization_config=None)  # says nothing either
    assert "packed" in refused(load_config, str(folder))


def test_what_is_no_causal_language_model(tmp_path):
    bert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL))
    t5 = {"d_model": 24, "num_layers": 1, "num_heads": 2, "d_ff": 40, "d_kv": 12, "vocab_size": 61}
    for name, model, said in (
        ("bert", bert, "an encoder (bert)"),
        ("t5", AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5)), "t5 is no causal language model"),
        ("bart", AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **BART)), "an encoder with a decoder"),
        ("headless", AutoModel.from_config(AutoConfig.for_model("llama", **SMALL)), "first lm_head.weight"),
    ):
        model.save_pretrained(tmp_path / name)
        assert said in refused(load_model, str(tmp_path / name)), name
    bert.config.is_decoder = True
    bert.save_pretrained(tmp_path / "decoder")
    assert load_config(str(tmp_path / "decoder")).is_decoder


def test_damaged_weights(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for contents in (whole[: len(whole) // 2], b"x" * 1000, b""):
        file.write_bytes(contents)
        assert f"{file}: damaged or incomplete" in refused(load_config, str(folder))
    file.unlink()
    assert "the model folder has no weights" in refused(load_config, str(folder))
    (folder / "flax_model.msgpack").write_bytes(b"")
    assert "flax_model.msgpack must be converted" in refused(load_config, str(folder))


def test_shards(tmp_path):
    model = build_model("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert torch.equal(load_model(str(folder)).lm_head.weight, model.lm_head.weight)
    shards[2].unlink()
    said = refused(load_config, str(folder))
    assert f"1 of {len(shards)} files of weights are missing, first {shards[2].name}" in said
    for contents in ("{", '{"weight_map": {}}', "[]", '{"weight_map": {"a": 3}}'):
        (folder / "model.safetensors.index.json").write_text(contents)
        assert "model.safetensors.index.json: damaged or incomplete" in refused(load_config, str(folder))


def test_places_without_a_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "not a Hugging Face model folder: it has no config.json"),
        (folder / "config.json", "a file, not a model folder"),
        ("me/none", "model me/none: "),
        ("me/no ne", "Repo id must use"),
    ):
        assert said in refused(load_config, str(name)), name
    assert "has no revision x" in refused(load_config, str(folder), revision="x")
    assert "two revisions, a and b" in refused(load_config, "me/none@a", revision="b")


def test_tokenizers_that_are_none(folder):
    assert "the folder has none (data.tokenizer names another)" in refused(load_tokenizer, str(folder))
    for name, contents in (
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"tokenizer_class": "Frobnicator"}'),
    ):
        (folder / name).write_text(contents)
        assert f"tokenizer {folder}: " in refused(load_tokenizer, str(folder))
        (folder / name).unlink()


# -- .bin files ------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def as_bin(folder, state, **how):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **how)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_a_bin_file_are_read(folder, zipped):
    model = build_model("llama")
    as_bin(folder, model.state_dict(), _use_new_zipfile_serialization=zipped)
    loaded = load_model(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert str(folder) in refused(load_model, str(folder))


def test_bin_shards(folder):
    state = build_model("llama").state_dict()
    names = list(state)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = load_model(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in names)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "first pytorch_model-00002-of-00002.bin" in refused(load_config, str(folder))


def test_a_bin_file_runs_no_code(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    as_bin(folder, {"lm_head.weight": Evil()})
    assert "holds more than tensors" in refused(load_model, str(folder))
    assert not (tmp_path / "evil").exists()
    as_bin(folder, build_model("llama"))
    assert "holds more than tensors" in refused(load_model, str(folder))
    (folder / "pytorch_model.bin").write_text("hello")
    assert "not a file of torch.save" in refused(load_config, str(folder))


# -- revisions -------------------------------------------------------------------------------------------


def test_a_revision_of_a_hub_model(tmp_path, monkeypatch):
    models = tiny_hub(tmp_path, monkeypatch)
    for name, how, expected in (
        ("me/tiny", {}, "main"),
        ("me/tiny", {"revision": "step3000"}, "step3000"),
        ("me/tiny@step3000", {}, "step3000"),
        ("me/tiny@step3000", {"revision": "step3000"}, "step3000"),
    ):
        assert torch.equal(load_model(name, **how).lm_head.weight, models[expected].lm_head.weight)
        assert load_config(name, **how).vocab_size == 2048
        assert len(load_tokenizer(name, **how)) == 2048
    assert "model me/tiny@step1: " in refused(load_config, "me/tiny", revision="step1")


def test_sources_are_remembered_as_they_were_named(tmp_path):
    source = ModelSource.named("me/tiny@step3000", adapter="me/adapter")
    assert source.about() == {"model": "me/tiny", "revision": "step3000", "adapter": "me/adapter"}
    assert ModelSource.recorded(source.about()) == source
    assert ModelSource.recorded({"model": "random weights"}) is ModelSource.recorded({}) is None
    (tmp_path / "run@home").mkdir()
    assert ModelSource.named(str(tmp_path / "run@home")).revision is None


# -- code of a model's own -------------------------------------------------------------------------------

CONFIGURATION = """from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_where_it_is_allowed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    settings(folder, auto_map=code, model_type="own", architectures=["OwnForCausalLM"])
    assert "runs only where trust_remote_code is set" in refused(load_model, str(folder))
    model = load_model(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(model.lm_head.weight, build_model("llama").lm_head.weight)
    source = ModelSource.named(str(folder), trust_remote_code=True)
    save_checkpoint(model, None, tmp_path / "edited", source=source, changed=["lm_head"])
    assert (tmp_path / "edited" / "modeling_own.py").read_text() == MODELING
    again = load_model(str(tmp_path / "edited"), trust_remote_code=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    (folder / "configuration_broken.py").write_text("import nonexistent_package\n" + CONFIGURATION)
    settings(folder, auto_map={"AutoConfig": "configuration_broken.OwnConfig"}, model_type="broken")
    assert "nonexistent_package" in refused(load_model, str(folder), trust_remote_code=True)
