"""What goes in comes out: every bit that no edit changed, in files read directly, and what lies beside the weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from lightning_kfac import EditConfig, KFACEditor, collect_factors
from lightning_kfac.editing.edited_model import save_edited
from lightning_kfac.loading import load_model, load_tokenizer
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.source import ModelSource
from tests.common import build_model, tiny_hub

ROWS = [{"input_ids": torch.arange(1, 61).view(3, 20)}]


def weights(folder):
    """Everything in a folder's safetensors, as it is."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def edited(source, path, dtype="auto", modules=(r".*layers\.1\.mlp\.up_proj",)):
    """Reads, edits one layer and writes; gives the model in memory."""
    source = source if isinstance(source, ModelSource) else ModelSource.named(str(source))
    model = load_model(source, dtype)
    factors = collect_factors(model, ROWS, modules=list(modules))
    report = KFACEditor(model, factors, EditConfig(rho=0.6)).apply()
    assert report.layers[0].n_kept < report.layers[0].n_total
    save_edited(model, None, path, report, source=source, fingerprint="")
    return model


def store(folder, dtype, **how):
    build_model("llama", dtype).save_pretrained(folder, **how)
    return folder


def changed(before, after):
    """Names of the tensors that differ in a bit, after the names were found to be the same."""
    assert set(before) == set(after)
    return [name for name in before if not same(before[name], after[name])]


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_edit_changes_its_layer_and_no_other_bit(tmp_path, dtype, shards):
    source = store(tmp_path / "source", dtype, max_shard_size=shards)
    model = edited(source, tmp_path / "edited")
    before, after = weights(source), weights(tmp_path / "edited")
    assert changed(before, after) == [UP] and after[UP].dtype == dtype
    assert model.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    # What was measured in memory is what is in the file.
    assert torch.equal(model.get_parameter(UP), after[UP].to(model.dtype))
    names = {file.name for file in source.iterdir()}
    assert {file.name for file in (tmp_path / "edited").iterdir()} == names | {"edit.json", "README.md"}
    assert (tmp_path / "edited" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "edited").dtype == dtype


def test_tensors_keep_their_own_dtypes(tmp_path):
    """Norms in float32 in a bfloat16 checkpoint, which transformers rounds when it loads them; no dtype in a config."""
    source = store(tmp_path / "source", torch.bfloat16)
    tensors = weights(source)
    noise = torch.rand(24, generator=torch.Generator().manual_seed(0))
    tensors |= {name: value.float() + noise for name, value in tensors.items() if "norm" in name}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
    edited(source, tmp_path / "edited")
    after = weights(tmp_path / "edited")
    assert changed(tensors, after) == [UP] and after[UP].dtype == torch.bfloat16
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert changed(weights(edited_again(source, tmp_path)), tensors) == [UP]
    assert "dtype" not in json.loads((tmp_path / "again" / "config.json").read_text())


def edited_again(source, tmp_path):
    edited(source, tmp_path / "again")
    return tmp_path / "again"


def test_an_edit_is_not_rounded_to_a_dtype_that_the_config_does_not_name(tmp_path):
    """The demo model: float16 in the file, float32 by its config."""
    model = edited("demo", tmp_path / "edited", modules=(r"model\.layers\.3\.mlp\.up_proj",))
    after = weights(tmp_path / "edited")
    name = "model.layers.3.mlp.up_proj.weight"
    assert same(after.pop(name), model.get_parameter(name).detach())
    assert {value.dtype for value in after.values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "edited").dtype == torch.float32


def test_a_dtype_that_is_named_is_written(tmp_path):
    source = store(tmp_path / "source", torch.float16)
    model = edited(source, tmp_path / "edited", "bfloat16")
    after = weights(tmp_path / "edited")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "edited" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bin_weights_become_safetensors_of_their_dtype(tmp_path, dtype):
    source = store(tmp_path / "source", dtype)
    before = weights(source)
    torch.save(before, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    edited(source, tmp_path / "edited")
    after = weights(tmp_path / "edited")
    assert sorted(changed(dict(sorted(before.items())), dict(sorted(after.items())))) == [UP]
    assert json.loads((tmp_path / "edited" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert not (tmp_path / "edited" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_weights_stay_tied(tmp_path, dtype):
    build_model("olmo2", dtype, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    edited(tmp_path / "source", tmp_path / "edited")
    before, after = weights(tmp_path / "source"), weights(tmp_path / "edited")
    assert changed(before, after) == [UP] and "lm_head.weight" not in after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_names_of_the_files_stay(tmp_path):
    """GPT-2 on the hub: no prefix, and buffers that nothing reads."""
    model = build_model("gpt2")
    model.save_pretrained(tmp_path / "source")
    tensors = {name.removeprefix("transformer."): value for name, value in weights(tmp_path / "source").items()}
    tensors |= {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64).tril() for block in range(3)}
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    edited(tmp_path / "source", tmp_path / "edited", modules=(r"transformer\.h\.1\.mlp\.c_fc",))
    assert changed(dict(sorted(tensors.items())), weights(tmp_path / "edited")) == ["h.1.mlp.c_fc.weight"]


EXPERTS = {
    "mixtral": {"num_local_experts": 3},
    "olmoe": {"num_experts": 3},
    "qwen2_moe": {"num_experts": 3, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 3},
    "gpt_oss": {"num_local_experts": 3},
    "granitemoe": {"num_local_experts": 3},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
NARROW = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", list(EXPERTS))
def test_an_expert_changes_only_its_own_tensors(tmp_path, monkeypatch, family, dtype):
    """transformers joins experts, and gate with up, when it loads them; the files get them back as they had them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **NARROW, **EXPERTS[family])
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / "source")
    model = load_model(str(tmp_path / "source"))
    joined = {name: p for name, p in model.named_parameters() if p.ndim == 3 and ".layers.1." in name}
    assert len(joined) == 2
    for parameter in joined.values():
        parameter.data[1] += 0.5
    monkeypatch.setattr("lightning_kfac.models.checkpoints._parameters", lambda model, layers: joined)
    save_checkpoint(model, None, tmp_path / "edited", source=ModelSource(str(tmp_path / "source")), changed=["experts"])
    before, after = weights(tmp_path / "source"), weights(tmp_path / "edited")
    different = changed(before, after)
    assert len(different) == (2 if family in ("gpt_oss", "granitemoe") else 3)
    assert all(".layers.1." in name for name in different)
    assert {value.dtype for value in after.values()} == {value.dtype for value in before.values()}
    loaded = load_model(str(tmp_path / "edited")).state_dict()
    for name, parameter in joined.items():
        assert torch.equal(loaded[name], parameter.to(dtype).float())


GEMMA3 = Gemma3Config(
    text_config={
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 61, "sliding_window": 16, "bos_token_id": 1,
        "eos_token_id": 0, "pad_token_id": 2,
    },
    vision_config={
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4, boi_token_index=50, eoi_token_index=51, image_token_index=52,
)  # fmt: skip
SIDE = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"temperature": 0.6, "top_p": 0.9, "do_sample": false, "eos_token_id": [0, 7]}',
    "special_tokens_map.json": "{}",
    "tokenizer_config.json": '{"a": 1}',
    "tokenizer.json": '{"odd":   "spacing"}',
    "vocab.txt": "a\nb\n",
    "merges.txt": "a b\n",
    "tokenizer.model": "pieces",
    "LICENSE": "Do as you like.",
    "USE_POLICY.md": "Be good.",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
LEFT = {
    "README.md": "A card.", "training_args.bin": "", "trainer_state.json": "{}", "optimizer.pt": "", "script.py": "",
    "model.safetensors.index.json.bak": "", "edit.json": "{}",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_multimodal_model_is_edited_in_its_text_part(tmp_path, dtype):
    torch.manual_seed(0)
    source = tmp_path / "source"
    Gemma3ForConditionalGeneration(GEMMA3).to(dtype).save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    for name, text in (SIDE | LEFT).items():
        (source / name).write_text(text)
    edited(source, tmp_path / "edited", modules=(r".*language_model\.layers\.1\.mlp\.up_proj",))
    (name,) = changed(weights(source), weights(tmp_path / "edited"))
    assert name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name
    for name, text in SIDE.items():
        assert (tmp_path / "edited" / name).read_text() == text, name
    assert "layers" in json.loads((tmp_path / "edited" / "edit.json").read_text())
    written = ("edit.json", "README.md")
    assert not [name for name in LEFT if name not in written and (tmp_path / "edited" / name).exists()]
    assert (tmp_path / "edited" / "README.md").read_text() != LEFT["README.md"]
    for kind in (AutoModelForCausalLM, Gemma3ForConditionalGeneration):
        loaded, info = kind.from_pretrained(tmp_path / "edited", output_loading_info=True)
        assert type(loaded) is Gemma3ForConditionalGeneration and loaded.dtype == dtype
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_weights_that_the_language_model_does_not_use_stay(tmp_path, capsys):
    """A text model is taken out of a multimodal checkpoint; what is written is the whole checkpoint again."""
    text = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["full_attention", "full_attention"],
    }  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 40, "depth": 1, "num_heads": 2, "out_hidden_size": 24,
              "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    model = edited(tmp_path / "source", tmp_path / "edited", modules=(r".*layers\.1\.mlp\.up_proj",))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    before, after = weights(tmp_path / "source"), weights(tmp_path / "edited")
    assert any("visual" in name for name in before)
    assert changed(before, after) == ["model.language_model.layers.1.mlp.up_proj.weight"]
    _, info = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "edited", output_loading_info=True)
    assert not info["missing_keys"]


def test_code_comes_along_where_the_config_names_it(tmp_path):
    source = store(tmp_path / "source", torch.float32)
    (source / "modeling_x.py").write_text("# code\n")
    edited(source, tmp_path / "without")
    assert not (tmp_path / "without" / "modeling_x.py").exists()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    edited(source, tmp_path / "edited")
    assert (tmp_path / "edited" / "modeling_x.py").read_text() == "# code\n"
    assert (tmp_path / "edited" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_tokenizer_of_another_place_is_saved_where_the_model_has_none(tmp_path):
    source = store(tmp_path / "source", torch.float32)
    model = load_model(str(source))
    tokenizer = load_tokenizer("demo")
    save_checkpoint(model, tokenizer, tmp_path / "a", source=ModelSource(str(source)), changed=[])
    assert len(load_tokenizer(str(tmp_path / "a"))) == 2048
    (source / "tokenizer.json").write_text("its own")
    save_checkpoint(model, tokenizer, tmp_path / "b", source=ModelSource(str(source)), changed=[])
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "its own"
    assert not (tmp_path / "b" / "tokenizer_config.json").exists()


def test_a_revision_of_a_hub_model_is_written_again(tmp_path, monkeypatch):
    tiny_hub(tmp_path, monkeypatch)
    snapshots = tmp_path / "hub" / "models--me--tiny" / "snapshots"
    (snapshots / ("b" * 40) / "chat_template.jinja").write_text("{{ messages }}")
    edited(ModelSource("me/tiny", revision="step3000"), tmp_path / "edited")
    assert changed(weights(snapshots / ("b" * 40)), weights(tmp_path / "edited")) == [UP]
    assert len(changed(weights(snapshots / ("a" * 40)), weights(tmp_path / "edited"))) == 2  # and the head
    assert (tmp_path / "edited" / "chat_template.jinja").read_text() == "{{ messages }}"
    details = json.loads((tmp_path / "edited" / "edit.json").read_text())
    assert (details["model"], details["revision"]) == ("me/tiny", "step3000")


def test_a_source_that_is_gone_is_no_obstacle(tmp_path):
    """Removed between reading and writing: the model in memory is written."""
    source = store(tmp_path / "source", torch.float16)
    before = weights(source)
    model = load_model(str(source))
    shutil.rmtree(source)
    save_checkpoint(model, None, tmp_path / "saved", source=ModelSource(str(source)), changed=[])
    after = weights(tmp_path / "saved")
    assert all(same(after[name], value) for name, value in before.items())
