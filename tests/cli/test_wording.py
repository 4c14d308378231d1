"""What a slip of the hand is answered with: one line, and what was probably meant."""

import pytest

from lightning_kfac import EditConfig, InputError
from lightning_kfac.cli.main import main
from lightning_kfac.errors import did_you_mean
from lightning_kfac.loading import load_model, load_tokenizer
from lightning_kfac.models.choices import block_choice, projection_choice

QUICK = ("fit", "--config", "quickstart")


def answer(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fti"], "fti: no such command; did you mean fit?"),
        (["fit", "--config", "quickstrat"], "no config of this name comes with the package; did you mean quickstart?"),
        (
            [*QUICK, "--colect.blocks", "3"],
            "unknown option --colect.blocks; did you mean --",
        ),
        (
            [*QUICK, "--collect.block", "3"],
            "unknown option --collect.block; did you mean --",
        ),
        ([*QUICK, "--edit.roh", "0.3"], "unknown key roh; did you mean rho?"),
        (["sweep", "--rhoss=[0.3]"], "unknown option --rhoss; did you mean --rhos?"),
        (["fit", "notes.txt"], "notes.txt: what is this? Options begin with --, as in --config notes.txt"),
        (
            ["fit", "--model.labels", "smapled"],
            "model.labels: 'smapled' is none of sampled, gold; did you mean",
        ),
        (["fit", "--data.max_tokens", "many"], "data.max_tokens: 'many' cannot be used; it takes int or null"),
        (["sweep", "--formulas", "[orignal]"], "did you mean original?"),
        ([*QUICK, "--collect.blocks", "3-x"], "blocks: '3-x' cannot be read; write all, 3, 3,4 or 3-5"),
        ([*QUICK, "--data.memorized", "{sorce: x}"], "unknown field 'sorce'; known are source, "),
    ],
)
def test_one_line_that_names_what_was_meant(words, said, capsys):
    assert said in answer(words, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle:\n  model_name: demo\n", "unknown key modle.model_name; did you mean model.model_name?"),
        ("data:\n  memorised: x\n", "unknown key data.memorised; did you mean data.memorized?"),
        ("edit:\n  roh: 0.3\n", "unknown key roh; did you mean rho?"),
    ],
)
def test_keys_of_a_config(text, said, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    assert said in answer(["fit", "--config", str(tmp_path / "own.yaml")], capsys)
    assert said in answer(["fit", str(tmp_path / "own.yaml")], capsys)  # a config that stands alone


def test_blocks_and_projections_as_people_write_them():
    for text, numbers in (
        ("3,4", [3, 4]),
        ("3-4", [3, 4]),
        ("3", [3]),
        (3, [3]),
        ("[0, 2-3]", [0, 2, 3]),
        ("-1", [-1]),
    ):
        assert block_choice(text) == numbers and EditConfig(blocks=text).blocks == numbers
    assert block_choice("all") == EditConfig(blocks="all").blocks == "all"
    assert block_choice("-3--1") == [-3, -2, -1]
    for wrong in ("", "4-3", "a", "3,", "3..4"):
        with pytest.raises(InputError, match="cannot be read; write all"):
            block_choice(wrong)
    assert projection_choice("gate, up") == EditConfig(projections="gate,up").projections == ["gate", "up"]
    assert projection_choice(None) is None and projection_choice(["q"]) == ["q"]


def test_only_what_looks_alike_is_offered():
    assert did_you_mean("xyz", ["rho", "formula"]) == "" and did_you_mean("roh", ["rho"]) == "; did you mean rho?"


@pytest.mark.parametrize("place", ["", "/below"])
def test_a_run_never_writes_into_its_model(place, tmp_path, capsys):
    load_model("demo").save_pretrained(tmp_path / "model")
    load_tokenizer("demo").save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    words = ["--model.model_name", str(tmp_path / "model"), "--data.memorized", "demo:unseen.jsonl"]
    for command in ("validate", "predict"):
        said = answer([command, *words, "--trainer.default_root_dir", f"{tmp_path}/model{place}"], capsys)
        assert "the model's own folder; name another" in said and sorted(tmp_path.rglob("*")) == before


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://nowhere.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    said = answer(["validate", "--model.model_name", "no/body", "--data.memorized", "demo:unseen.jsonl"], capsys)
    assert said.startswith("error: model no/body: neither a folder here nor in the hub's cache, and https://")
    assert "cannot be reached" in said
