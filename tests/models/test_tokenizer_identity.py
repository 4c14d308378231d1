"""Tokenizers that transformers builds otherwise than their file says, and fingerprints of what tokenizers do."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_kfac.cli.train import main as train
from lightning_kfac.errors import InputError
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.tokenizer_identity import PROBES, first_difference, tokenizer_fingerprint
from tests.common import build_model

TEXT = ["the year 2023 and 2024, 2023 2023: it's the day; don't 12345"]
# As Llama-3's: every digit apart, where GPT-2's pattern keeps them together.
DIGITS_APART = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+|[^\s\p{L}\p{N}]+"


def digits_apart(start: bool = False) -> Tokenizer:
    """A byte-level BPE with merges of digits, which its own Split pattern keeps apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>", "<|start|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    split = pre_tokenizers.Split(Regex(DIGITS_APART), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    return tokenizer


def stored(folder: Path, tokenizer: Tokenizer, tokenizer_class: str, model_type: str | None = None) -> Path:
    """A model's folder as far as a tokenizer is concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": "<|end|>", "bos_token": "<|start|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **about}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "olmoe"])
@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "GPTNeoXTokenizer"])
def test_a_pattern_that_is_ignored_stops_the_run(tmp_path, tokenizer_class, model_type, capsys):
    own = digits_apart()
    folder = stored(tmp_path / "model", own, tokenizer_class, model_type)
    built = AutoTokenizer.from_pretrained(folder)
    theirs, ours = built("2023")["input_ids"], own.encode("2023").ids
    assert len(theirs) < len(ours) == 4
    with pytest.raises(InputError, match=re.escape(f"'2023' is {theirs}, by the file {ours}; set data.own_tokenizer")):
        load_tokenizer(str(folder))

    found = load_tokenizer(str(folder), own_tokenizer=True)
    assert "the file's own tokenizer is used" in capsys.readouterr().err.replace("\n", " ")
    assert [found(text)["input_ids"] for text in PROBES] == [own.encode(text).ids for text in PROBES]
    assert (found.eos_token, found.bos_token) == ("<|end|>", "<|start|>")
    assert found.apply_chat_template([{"role": "user", "content": "2023"}], tokenize=False) == "2023"
    found.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert again("2023")["input_ids"] == ours
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(found) != tokenizer_fingerprint(built)

    as_built = load_tokenizer(str(folder), own_tokenizer=False)
    assert as_built("2023")["input_ids"] == theirs


def test_a_start_token_that_is_dropped_stops_the_run(tmp_path):
    """GPTNeoXTokenizer leaves out what the file puts before a text, even where the rest is the same."""
    tokenizer = digits_apart(start=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    folder = stored(tmp_path / "model", tokenizer, "GPTNeoXTokenizer", "llama")
    ids = tokenizer.encode(PROBES[0]).ids
    with pytest.raises(InputError, match=re.escape(f"is {ids[1:]}, by the file {ids}")):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), own_tokenizer=True)(PROBES[0])["input_ids"] == ids


def test_tokenizers_that_do_as_their_file_says(tmp_path, capsys):
    own = digits_apart(start=True)
    own.enable_padding(length=64, pad_id=0, pad_token="<|end|>")
    own.enable_truncation(8)
    for number, tokenizer_class in enumerate(("PreTrainedTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend")):
        folder = stored(tmp_path / str(number), own, tokenizer_class, "olmo2")
        found = load_tokenizer(str(folder), own_tokenizer=True)
        assert type(found) is type(AutoTokenizer.from_pretrained(folder))
    assert load_tokenizer("demo").eos_token_id is not None
    assert "own tokenizer" not in capsys.readouterr().err


def test_no_file_to_compare_with(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert load_tokenizer(str(tmp_path))("a b", add_special_tokens=False)["input_ids"] == [5, 6]


def test_the_file_of_a_hub_name_is_the_one_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "models--someone--model"
    stored(cache / "snapshots" / ("a" * 40), digits_apart(), "GPT2Tokenizer", "gpt2")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for module in ("huggingface_hub.file_download", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"tokenizer someone/model: transformers .* makes other ids"):
        load_tokenizer("someone/model")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: damaged or incomplete"):
        first_difference(load_tokenizer("demo"), tmp_path / "tokenizer.json")


def test_the_command_line_stops_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    build_model("llama", vocab_size=400).save_pretrained(folder)
    stored(folder, digits_apart(), "GPT2Tokenizer")
    Path("notes.txt").write_text("In 2023 it was the day. " * 20)
    options = ["--model.model_name", "model", "--data.heldout", "notes.txt", "--data.seq_len", "16", "--trainer.logger",
               "false", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        train(["validate", *options])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "set --data.own_tokenizer to true" in said and "Traceback" not in said
    train(["validate", *options, "--data.own_tokenizer", "true"])


def test_a_fingerprint_is_of_what_a_tokenizer_does(tmp_path):
    first = load_tokenizer(str(stored(tmp_path / "a", digits_apart(), "PreTrainedTokenizerFast")))
    known = tokenizer_fingerprint(first)
    assert re.fullmatch("[0-9a-f]{64}", known)
    moved = load_tokenizer(str(stored(tmp_path / "b", digits_apart(), "PreTrainedTokenizerFast")))
    assert tokenizer_fingerprint(moved) == known
    moved.pad_token = moved.eos_token
    ids = moved(["a", "the year 2023"], padding=True, truncation=True, max_length=3)["input_ids"]
    backend = moved.backend_tokenizer
    state = backend.padding, backend.truncation
    assert None not in state and tokenizer_fingerprint(moved) == known
    assert (backend.padding, backend.truncation) == state
    assert moved(["a", "the year 2023"], padding=True, truncation=True, max_length=3)["input_ids"] == ids
    moved.save_pretrained(tmp_path / "c")
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "c"))) == known

    split = digits_apart()
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    starting = digits_apart(start=True)
    added = digits_apart()
    added.add_tokens(["forsooth"])
    other_merges = json.loads(digits_apart().to_str())
    other_merges["model"]["merges"].reverse()
    merged = Tokenizer.from_str(json.dumps(other_merges))
    others = [split, starting, added, merged]
    found = {
        tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", bos_token="<|start|>"))
        for t in others
    }
    assert len(found | {known}) == len(others) + 1
    first.eos_token = "<|start|>"  # documents end with it
    assert tokenizer_fingerprint(first) != known


def test_a_fingerprint_without_a_backend():
    class Letters:
        """A tokenizer in Python, as some repositories bring their own."""

        eos_token_id = 0

        def __init__(self, upper):
            self.upper = upper

        def get_vocab(self):
            return {chr(n): n for n in range(128)}

        def __call__(self, text):
            return {"input_ids": [ord(letter) % 128 for letter in (text.upper() if self.upper else text)]}

    assert tokenizer_fingerprint(Letters(False)) == tokenizer_fingerprint(Letters(False))
    assert tokenizer_fingerprint(Letters(False)) != tokenizer_fingerprint(Letters(True))
