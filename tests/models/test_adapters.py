"""Adapters of peft: a model that carries one, and a folder that holds one. Real ones where peft is installed."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_kfac import EditConfig, KFACEditor, collect_factors, memorization_score, ndcg, perplexity
from lightning_kfac.cli.train import main
from lightning_kfac.editing.edited_model import edit_details
from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_config, load_model, load_tokenizer
from tests.common import build_model, edit, failed

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
IDS = torch.arange(1, 41).view(2, 20)
ROWS = [{"input_ids": IDS}]


class Wrapper(nn.Module):
    """What matters of peft's, without peft: the causal model inside, and every other attribute its own."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args, **keywords):
        return self.base_model(*args, **keywords)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def with_lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    how = {"r": 4, "target_modules": ["gate_proj", "q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(model), LoraConfig(**how | settings)).eval()


@pytest.fixture(scope="module")
def base():
    return build_model("llama", vocab_size=2048)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """A model and a LoRA adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base.save_pretrained(folder / "base")
    load_tokenizer("demo").save_pretrained(folder / "base")
    with_lora(base).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def figures(model):
    score = memorization_score(model, None, IDS[:, :10].tolist(), IDS[:, 10:].tolist())
    return score.continuations, perplexity(model, None, IDS.tolist()), ndcg(model, model, None, IDS.tolist())


def test_a_wrapped_model_is_measured_and_collected_only_when_it_is_unwrapped(base):
    assert figures(Wrapper(base)) == figures(base)
    with pytest.raises(InputError, match=r"carries an adapter, .* model\.merge_and_unload\(\)"):
        collect_factors(Wrapper(base), ROWS, blocks=[1])
    with pytest.raises(InputError, match="carries an adapter"):
        KFACEditor(Wrapper(base), collect_factors(base, ROWS, blocks=[1]), EditConfig())


@needs_peft
def test_a_model_with_an_adapter_is_measured_with_it(base):
    wrapped = with_lora(base)
    continuations, wrapped_perplexity, _ = figures(wrapped)
    merged_model = copy.deepcopy(wrapped).merge_and_unload()
    merged, merged_perplexity, _ = figures(merged_model)
    assert continuations == merged and continuations != figures(base)[0]
    assert wrapped_perplexity == pytest.approx(merged_perplexity, rel=1e-5)
    with pytest.raises(InputError, match=r"carries an adapter \(.*q_proj\)"):
        collect_factors(wrapped, ROWS, blocks=[1])
    with pytest.raises(InputError, match="carries an adapter"):
        collect_factors(wrapped.get_base_model(), ROWS, blocks=[1])
    assert len(collect_factors(merged_model, ROWS, blocks=[1])) == 3


@needs_peft
def test_an_adapter_of_the_prompt_is_refused(base, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match="changes the prompt"):
        perplexity(model, None, IDS.tolist())
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="changes the prompt"):
        load_model(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_on_request(base, folders, dtype):
    name = str(dtype).removeprefix("torch.")
    merged = load_model(str(folders[0]), name, adapter=str(folders[1]))
    weight = base.model.layers[1].mlp.gate_proj.weight
    parts = load_file(folders[1] / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.mlp.gate_proj"
    change = 2 * parts[f"{place}.lora_B.weight"] @ parts[f"{place}.lora_A.weight"]  # lora_alpha 8 / r 4
    found = merged.model.layers[1].mlp.gate_proj.weight
    assert found.dtype == dtype and type(merged.model.layers[1].mlp.gate_proj) is nn.Linear
    # In bfloat16 the sum is rounded, and so are the product and its factors: an eighth bit of each.
    assert torch.allclose(found.float(), weight + change, atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight.to(dtype))


def test_an_adapter_is_no_model(tmp_path, base):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "me/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for load in (load_config, load_model):
        with pytest.raises(InputError, match=r"is an adapter .* \(me/base\) and model\.adapter to this folder"):
            load(str(folder))
    base.save_pretrained(folder)
    with pytest.raises(InputError, match="holds a model and an adapter"):
        load_config(str(folder))


def test_what_cannot_be_merged(tmp_path, base, monkeypatch):
    base.save_pretrained(tmp_path / "base")
    if find_spec("peft") is not None:
        for adapter in (tmp_path / "base", tmp_path / "nowhere"):
            with pytest.raises(InputError, match=r"model\.adapter .*adapter_config\.json"):
                load_model(str(tmp_path / "base"), adapter=str(adapter))
        with_lora(build_model("llama", num_hidden_layers=1)).save_pretrained(tmp_path / "shallow")
        with pytest.raises(InputError, match=r"cannot be merged: it is of another model: .*layers\.1"):
            load_model(str(tmp_path / "base"), adapter=str(tmp_path / "shallow"))
        with_lora(build_model("llama", hidden_size=32)).save_pretrained(tmp_path / "wide")
        with pytest.raises(InputError, match=r"cannot be merged: .*size mismatch"):
            load_model(str(tmp_path / "base"), adapter=str(tmp_path / "wide"))
    monkeypatch.setattr("lightning_kfac.models.adapters.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs peft: pip install 'lightning-kfac\[peft\]'"):
        load_model(str(tmp_path / "base"), adapter="me/adapter")


@needs_peft
def test_an_edit_of_a_merged_model_knows_where_it_comes_from(folders, tmp_path, capsys):
    """Factors, edit.json and restore name the adapter; nobody has to name it twice."""
    base, adapter = folders
    run = tmp_path / "run"
    main([
        "fit", "--model.model_name", str(base), "--model.adapter", str(adapter), "--data.tokenizer", "demo",
        "--data.max_tokens", "300", "--data.seq_len", "50", "--collect.blocks", "[1]", "--collect.projections", "[up]",
        "--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    edit("apply", factors=run / "factors", rho=0.5, output=tmp_path / "edited")
    details = edit_details(str(tmp_path / "edited"))
    assert (details["model"], details["adapter"]) == (str(base), str(adapter))
    edit("restore", model=tmp_path / "edited", output=tmp_path / "restored")
    merged = load_model(str(base), adapter=str(adapter)).state_dict()
    restored = load_model(str(tmp_path / "restored")).state_dict()
    assert all(torch.equal(restored[name], value) for name, value in merged.items())
    capsys.readouterr()
    assert "belong to a --model" in failed(
        capsys, "apply", factors=run / "factors", rho=0.5, output=tmp_path / "x", adapter=adapter
    )
