"""Models of a revision, of a dtype, and such as no command can use, through whole commands."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_kfac import load_factors
from lightning_kfac.cli.train import main
from lightning_kfac.loading import load_model, load_tokenizer
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import build_model, edit, failed, results, tiny_hub

UP = "model.layers.1.mlp.up_proj.weight"


def options(folder, **changes):
    settings = {
        "data.max_tokens": 300, "data.seq_len": 50, "data.heldout": "embedded", "data.heldout_tokens": 100,
        "collect.blocks": "[1]", "collect.projections": "[up]", "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
    } | changes  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def fit_and_edit(folder, **model):
    main(["fit", *options(folder, **{"edit.rho": 0.5}, **model)])


@pytest.mark.parametrize("how", ["option", "name"])
def test_a_revision_is_remembered_everywhere(tmp_path, monkeypatch, capsys, how):
    models = tiny_hub(tmp_path, monkeypatch)
    model = {"model.model_name": "me/tiny", "model.revision": "step3000"}
    if how == "name":
        model = {"model.model_name": "me/tiny@step3000"}
    run = tmp_path / "run"
    fit_and_edit(run, **model)
    metadata = load_factors(run / "factors").metadata
    details = json.loads((run / "edited" / "edit.json").read_text())
    for about in (metadata, details, *results(run)):
        assert (about["model"], about["revision"]) == ("me/tiny", "step3000")
    assert metadata["tokenizer"] == "me/tiny"
    assert metadata["fingerprint"] == weights_fingerprint(models["step3000"], [UP.removesuffix(".weight")])
    # Nobody has to name it again: factors and edit.json say it.
    edit("apply", factors=run / "factors", rho=0.5, output=tmp_path / "again")
    edit("restore", model=tmp_path / "again", output=tmp_path / "restored")
    kept = models["step3000"].state_dict()
    assert all(torch.equal(load_file(tmp_path / "restored" / "model.safetensors")[n], v) for n, v in kept.items())
    check = {"model.model_name": run / "edited", "trainer.default_root_dir": tmp_path / "check"}
    settings = options(run, **check)
    del settings[settings.index("--collect.blocks") : settings.index("--trainer.default_root_dir")]
    main(["validate", *settings])
    baseline, edited = results(tmp_path / "check")
    assert (baseline["model"], baseline["revision"]) == ("me/tiny", "step3000") and edited["ndcg@10"] < 1
    assert edited["measured"]["reference"] == "me/tiny@step3000"
    assert baseline["perplexity"] == pytest.approx(results(run)[0]["perplexity"], rel=1e-6)
    capsys.readouterr()
    assert "the factors belong" in " ".join(
        failed(capsys, "apply", factors=run / "factors", model="me/tiny", rho=0.5, output=tmp_path / "x").split()
    ).replace("these factors", "the factors")
    edit("plan", model="me/tiny", revision="step3000", tokens=1000, hardware="cpu")
    assert "--model.model_name me/tiny" in (said := " ".join(capsys.readouterr().out.split()))
    assert "--model.revision step3000" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_edit_and_its_restoration_keep_the_dtype_and_every_bit(tmp_path, dtype):
    source = tmp_path / "source"
    build_model("llama", dtype, vocab_size=2048).save_pretrained(source)
    load_tokenizer("demo").save_pretrained(source)
    run = tmp_path / "run"
    fit_and_edit(run, **{"model.model_name": source})
    precision = "float32" if dtype == torch.float16 else "bfloat16"
    assert load_factors(run / "factors").metadata["precision"] == precision
    edit("apply", factors=run / "factors", rho=0.5, output=tmp_path / "again")
    edit("apply", factors=run / "factors", rho=0.5, output=tmp_path / "patch", save="patch")
    edit("apply", patch=tmp_path / "patch", output=tmp_path / "patched")
    edit("restore", model=run / "edited", output=tmp_path / "restored")
    files = {name: tmp_path / name / "model.safetensors" for name in ("source", "again", "patched", "restored")}
    before = load_file(files["source"])
    for name in ("again", "patched", "restored"):
        after = load_file(files[name])
        same = [n for n in before if torch.equal(before[n], after[n]) and after[n].dtype == dtype]
        assert set(before) - set(same) == (set() if name == "restored" else {UP}) and after[UP].dtype == dtype
    in_run = (run / "edited" / "model.safetensors").read_bytes()
    assert files["again"].read_bytes() == files["patched"].read_bytes() == in_run
    assert files["restored"].read_bytes() == files["source"].read_bytes()
    # What was measured in the run is what the checkpoint measures.
    check = {"model.model_name": run / "edited", "trainer.default_root_dir": tmp_path / "check"}
    settings = options(run, **check)
    del settings[settings.index("--collect.blocks") : settings.index("--trainer.default_root_dir")]
    main(["validate", *settings])
    assert results(tmp_path / "check")[-1]["perplexity"] == results(run)[-1]["perplexity"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantized (gptq)"),
        ({"intermediate_size": 48}, "is [40, 24] in its file, [48, 24] by config.json"),
        ({"model_type": "t5"}, "t5 is no causal language model"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_what_no_command_can_use_is_refused_before_any_work(tmp_path, capsys, command, damage, said):
    source = tmp_path / "source"
    build_model("llama", vocab_size=2048).save_pretrained(source)
    load_tokenizer("demo").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | damage))
    settings = options(tmp_path / "run", **{"model.model_name": source, "data.seq_len": 120})
    if command != "fit":
        del settings[settings.index("--collect.blocks") : settings.index("--trainer.default_root_dir")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([command, *settings])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "run").exists()
    if "intermediate_size" not in damage:  # a plan reads no weights
        assert said in failed(capsys, "plan", model=source, tokens=1000, hardware="cpu")


def test_a_search_that_has_no_window_is_refused_before_the_text_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--model.model_name", "demo", "--data.seq_len", "100", "--trainer.default_root_dir",
              str(tmp_path / "run")])  # fmt: skip
    assert "data.seq_len is 100, less than a window of 112 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer_is_edited_without_one(tmp_path):
    """Factors of text that another tokenizer read; the edited checkpoint has what the model's folder has."""
    source = tmp_path / "source"
    build_model("llama", vocab_size=2048).save_pretrained(source)
    main(["fit", *options(tmp_path / "run", **{"model.model_name": source, "data.tokenizer": "demo"})])
    edit("apply", factors=tmp_path / "run" / "factors", rho=0.5, output=tmp_path / "edited")
    names = {file.name for file in source.iterdir()} | {"edit.json", "README.md"}
    assert {file.name for file in (tmp_path / "edited").iterdir()} == names


def test_a_reference_of_a_revision(tmp_path, monkeypatch):
    """``--model.reference`` takes NAME@REVISION too."""
    tiny_hub(tmp_path, monkeypatch)
    changes = {"model.model_name": "me/tiny", "model.reference": "me/tiny@step3000"}
    settings = options(tmp_path / "check", **changes)
    del settings[settings.index("--collect.blocks") : settings.index("--trainer.default_root_dir")]
    main(["validate", *settings])
    baseline, edited = results(tmp_path / "check")
    assert (baseline["revision"], edited["model"], "revision" in edited) == ("step3000", "me/tiny", False)
    assert load_model("me/tiny").lm_head.weight.shape == (2048, 24)
