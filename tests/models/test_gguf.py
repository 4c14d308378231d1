"""GGUF files: read through transformers, dequantized, and written as ordinary checkpoints."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_kfac.cli.train import main
from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_config, load_model, load_tokenizer
from tests.common import build_model, edit, failed

pytestmark = pytest.mark.skipif(not (find_spec("gguf") and find_spec("accelerate")), reason="gguf is not installed")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def in_file(name):
    """The name that llama.cpp gives a weight."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, block, rest = stem.split(".", 3)
        return f"blk.{block}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def write(path, model):
    """Matrices of the MLPs in 8 bits, the rest in float32; gives what the 8 bits hold, by name."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *LETTERS, "ab"]
    tokens += [f"<{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    held = {}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs of neighbours, transformers halves
            halves = array.reshape(config.num_attention_heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        if "mlp" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            held[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
            writer.add_tensor(in_file(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(in_file(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder, model, and what its 8 bits hold."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = build_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("gguf")
    return folder, model, write(folder / "tiny.gguf", model)


def test_weights_are_those_of_the_file(tiny):
    folder, model, held = tiny
    loaded = load_model(str(folder), gguf_file="tiny.gguf")
    assert loaded.dtype == torch.float32 and not hasattr(loaded.config, "quantization_config")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, held.get(name, model.state_dict()[name])), name
    assert load_model(str(folder), "bfloat16", gguf_file="tiny.gguf").dtype == torch.bfloat16
    assert load_tokenizer(str(folder), gguf_file="tiny.gguf")("ab").input_ids[-1] == 29


def test_a_run_on_a_gguf_file(tiny, tmp_path):
    folder, _, held = tiny
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "abcab" * 20}) + "\n" for _ in range(9)))
    main([
        "fit", "--model.model_name", str(folder), "--model.gguf_file", "tiny.gguf", "--data.corpus", str(text),
        "--data.max_tokens", "300", "--data.seq_len", "50", "--collect.blocks", "[1]", "--collect.projections", "[up]",
        "--edit.rho", "0.5", "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "edited").state_dict()
    different = [name for name, value in held.items() if not torch.equal(edited[name], value)]
    assert different == ["model.layers.1.mlp.up_proj.weight"]
    assert load_tokenizer(str(tmp_path / "run" / "edited"))("ab").input_ids[-1] == 29
    details = json.loads((tmp_path / "run" / "edited" / "edit.json").read_text())
    assert (details["model"], details["gguf_file"]) == (str(folder), "tiny.gguf")


def test_a_plan_reads_its_header(tiny, capsys):
    edit("plan", model=tiny[0], gguf_file="tiny.gguf", tokens=1000, hardware="cpu")
    assert "--model.gguf_file tiny.gguf" in " ".join(capsys.readouterr().out.split())
    assert "name it with model.gguf_file" in failed(capsys, "plan", model=tiny[0], tokens=1000)


def test_wrong_gguf_files(tiny, tmp_path, monkeypatch):
    folder = tiny[0]
    for call, said in (
        (lambda: load_config(str(folder)), "it has tiny.gguf: name it with model.gguf_file"),
        (lambda: load_config(str(folder / "tiny.gguf")), "and model.gguf_file to tiny.gguf"),
        (lambda: load_config(str(folder), gguf_file="other.gguf"), "other.gguf: no such file"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    whole = (folder / "tiny.gguf").read_bytes()
    for contents in (whole[:5000], whole[:-5000], b"nonsense" * 99):
        (tmp_path / "tiny.gguf").write_bytes(contents)
        with pytest.raises(InputError, match="model "):
            load_model(str(tmp_path), gguf_file="tiny.gguf")
    monkeypatch.setattr("lightning_kfac.models.loading.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gguf: pip install 'lightning-kfac\[gguf\]'"):
        load_config(str(folder), gguf_file="tiny.gguf")
