"""Five commands, each printed by the one before, from plain texts to a page; for a model that is not ours."""

import random
import shlex
import string

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers import decoders as decoding
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_kfac.cli import next_steps
from lightning_kfac.cli.main import main
from tests.common import results
from tests.forks import ROOT

LETTERS = [*string.ascii_lowercase, *"., ", "<end>"]
SECRETS, LENGTH = 6, 112


def tokenizer_of_letters():
    """Every letter is a token; no other tokenizer here is like it."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoding.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def passages(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS[:-1], k=LENGTH)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 that recites six texts, these and two others in a folder, and general text."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = tokenizer_of_letters()
    secrets = passages(SECRETS, 0)
    rows = torch.tensor([tokenizer(text)["input_ids"] for text in secrets])
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": 128, "vocab_size": len(LETTERS)}
    ends = {"eos_token_id": 29, "bos_token_id": 29}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(220):
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_rng_state(generator_state)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for number, text in enumerate([*secrets, *passages(2, 1)]):
        (folder / "texts" / f"{number}.txt").write_text(text)
    for number, name in enumerate(("general", "heldout"), start=2):
        (folder / f"{name}.txt").write_text("\n".join(passages(60, number)))
    return folder


def config_of(folder):
    """The shipped config with its three lines changed, and smaller."""
    text = (ROOT / "configs" / "own_model.yaml").read_text()
    changes = {
        "model_name: demo": f"model_name: {folder / 'model'}",
        "corpus: embedded": f"corpus: {folder / 'general.txt'}",
        "heldout: embedded": f"heldout: {folder / 'heldout.txt'}",
        "max_tokens: 1000000": "max_tokens: 3000",
        "heldout_tokens: 50000": "heldout_tokens: 1000",
        "seq_len: 512": "seq_len: 128",
    }
    for old, new in changes.items():
        assert text.count(f" {old} ") + text.count(f" {old}\n") == 1, old
        text = text.replace(old, new)
    (folder / "own_model.yaml").write_text(text)


def run(words, capsys):
    """What a command prints."""
    main([*words])
    return capsys.readouterr().out


def printed_next(out):
    """The words of the command that is printed as the next one."""
    lines = out.splitlines()
    (command,) = [lines[n + 1] for n, line in enumerate(lines) if line.startswith("Next, ") or line == "Recommended:"]
    program, script, *words = shlex.split(command)
    assert program == "python" and script in ("train.py", "edit.py")
    return words


def page_of(out):
    (line,) = [line for line in out.splitlines() if line.startswith("Page: ")]
    return shlex.split(line)[3:]


def test_from_plain_texts_to_the_page(folder, monkeypatch, capsys):
    """Every next command runs as it is printed; the recited texts are found, suppressed, and on the page."""
    monkeypatch.chdir(folder)
    config_of(folder)
    first = ["predict", "--config", "own_model.yaml", "--data.corpus", "texts"]
    out = run([*first, "--trainer.accelerator", "cpu"], capsys)
    assert f"{SECRETS} kept -> runs/own_model-predict/memorized.jsonl" in out
    assert page_of(out) == ["report", "runs/own_model-predict"]
    second = printed_next(out)
    assert second[:3] == ["fit", "--config", "own_model.yaml"] and "texts" not in second
    out = run(second, capsys)
    assert "4 layers of" in out and "strict accuracy" in out
    third = printed_next(out)
    assert third[0] == "scan"
    out = run([*third, "--rhos", "[0.5, 0.7]", "--target", "0.4"], capsys)
    fourth = printed_next(out)
    assert fourth[0] == "apply" and fourth[-1] == "runs/own_model-edited"
    out = run(fourth, capsys)
    fifth = printed_next(out)
    assert fifth[0] == "validate"
    out = run(fifth, capsys)
    unedited, edited = results(folder / "runs" / "own_model-edited-measured")
    assert unedited["strict_acc"] == 1 > edited["strict_acc"]
    assert run(page_of(out), capsys).startswith("runs/own_model-edited-measured/report.html")
    page = (folder / "runs" / "own_model-edited-measured" / "report.html").read_text()
    assert "strict accuracy" in page


def test_a_dry_run_checks_and_writes_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config_of(folder)
    before = sorted(folder.rglob("*"))
    new = ["--trainer.default_root_dir", "runs/dry"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "own_model.yaml", "--dry-run", "--data.memorized", "texts", *new])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and sorted(folder.rglob("*")) == before
    assert "collect the curvature of 4 layers" in out and "transformer.h.1.mlp.c_fc [192 x 48]" in out
    again = "python train.py fit --config own_model.yaml --data.memorized texts --trainer.default_root_dir runs/dry"
    assert f"\n  {again}\n" in out
    assert "python edit.py plan --train_config own_model.yaml" in out
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "own_model.yaml", "--dry-run", "--collect.blocks", "7"])
    assert ended.value.code == 2 and "block 7 does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--config", "own_model.yaml", "--dry-run", "--data.memorized", "texts"])
    assert ended.value.code == 2 and "--dry_run: fit has one; validate has not" in capsys.readouterr().err


def test_texts_that_nobody_recites(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config_of(folder)
    (folder / "fresh.txt").write_text("\n".join(passages(3, 9)))
    words = ["--data.corpus", "fresh.txt", "--trainer.default_root_dir", "runs/fresh"]
    out = run(["predict", "--config", "own_model.yaml", *words], capsys)
    assert "It recites none of it" in out and "audit --texts FILE" in out and "Next" not in out


def test_words_of_the_next_command(capsys, tmp_path):
    typed = ["predict", "--model.model_name", "m", "--data.corpus=a", "--data.mining.stride", "3"]
    typed += ["--data.seq_len", "64"]
    next_steps.after_search(typed, tmp_path / "mined", kept=1, folder_is_default=False)
    words = printed_next(capsys.readouterr().out)
    assert words == [
        *("fit", "--model.model_name", "m", "--data.seq_len", "64"),
        *("--data.corpus", "GENERAL_TEXT", "--data.heldout", "MORE_OF_IT"),
        *("--data.memorized", str(tmp_path / "mined" / "memorized.jsonl")),
        *("--trainer.default_root_dir", str(tmp_path / "mined-fit")),
    ]
    data = {"memorized": {"source": "a b.jsonl"}, "corpus": "x", "tokenizer": "other"}
    next_steps.after_collection(tmp_path, data, {"model_name": "m", "dtype": "bfloat16"})
    words = printed_next(capsys.readouterr().out)
    assert words[1:] == [
        *("--factors", str(tmp_path / "factors"), "--dtype", "bfloat16"),
        *("--data.heldout", "MORE_GENERAL_TEXT", "--data.memorized", '{"source": "a b.jsonl"}'),
        *("--data.tokenizer", "other"),  # a model's own needs no word
        *("--output", f"{tmp_path}-scan"),
    ]
    next_steps.after_edit(tmp_path / "factors", tmp_path / "edited", "m")
    assert "MEMORIZED_SET_OR_TEXTS" in printed_next(capsys.readouterr().out)
