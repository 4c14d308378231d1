"""A text in pieces has the ids of the whole, whatever the tokenizer and wherever a piece ends."""

import io
import random
import tracemalloc

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_kfac.data.demo.embedded import embedded_documents
from lightning_kfac.data.pieces import ids_in_pieces
from lightning_kfac.models.loading import load_tokenizer

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENGLISH = [document.text for document in embedded_documents()[:400]]


def nasty_text(length: int, seed: int) -> str:
    """Words, and what is hard to cut: runs of white space, of one letter, of digits, of characters of several bytes."""
    chance = random.Random(seed)
    hard = [
        lambda n: " " * n,
        lambda n: "\n" * n,
        lambda n: "\r\n" * n,
        lambda n: " \t" * n,
        lambda n: "a" * n,
        lambda n: "ab" * n,
        lambda n: "".join(chance.choice("0123456789") for _ in range(n)),
        lambda n: "".join(chance.choice("的一是不了人我在有他") for _ in range(n)),
        lambda n: "👩‍👩‍👧‍👦" * n,
        lambda n: "e\u0301" * n,
        lambda n: "<|endoftext|>" * (n // 8 + 1),
        lambda n: "\u00a0\u3000" * n,
        lambda n: "Straße İstanbul ﬁn " * n,
    ]
    parts: list[str] = []
    size = 0
    while size < length:
        text = chance.choice(ENGLISH)[: chance.randrange(20, 1500)]
        if chance.random() < 0.6:
            text += chance.choice(hard)(int(10 ** chance.uniform(0, 3.2)))
        parts.append(text)
        size += len(text)
    return "".join(parts)


def trained(model, trainer, **parts) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([*ENGLISH[:200], nasty_text(20_000, 99)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def bpe(**options):
    return trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False, **options
    )


def gpt2():
    level = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), bpe(initial_alphabet=alphabet), pre_tokenizer=level)


def gpt4():
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), bpe(initial_alphabet=alphabet), pre_tokenizer=split, normalizer=normalizers.NFC())


def llama2():
    """Trained word by word, then used as SentencePiece is: the whole text is one word with a mark before it."""
    tokenizer = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), bpe(), pre_tokenizer=pre_tokenizers.Metaspace(split=True)
    )
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def metaspace():
    return trained(models.BPE(unk_token="<unk>"), bpe(), pre_tokenizer=pre_tokenizers.Metaspace(split=True))


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>", "<|endoftext|>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), normalizer=normalizers.NFKC())


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]", "<|endoftext|>"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(),
    )


def with_added_words():
    tokenizer = gpt4()
    tokenizer.add_tokens([AddedToken("\n\n\n", normalized=False), AddedToken("the value", lstrip=True, rstrip=True)])
    return tokenizer


KINDS = [gpt2, gpt4, llama2, metaspace, unigram, wordpiece, with_added_words]


@pytest.fixture(scope="module", params=["demo", *KINDS], ids=lambda kind: getattr(kind, "__name__", kind))
def any_tokenizer(request):
    return load_tokenizer("demo") if request.param == "demo" else request.param()


@pytest.mark.parametrize("piece", [2_000, 5_000])
def test_ids_are_those_of_the_whole_text(any_tokenizer, piece):
    for seed in range(6):
        text = nasty_text(60_000, seed)
        whole = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        found = list(ids_in_pieces(any_tokenizer, io.StringIO(text, newline=""), piece))
        assert np.concatenate(found).tolist() == whole
        assert len(found) > 5


@pytest.mark.parametrize("text", ["", "a", " ", "\n", "One short text.", "a" * 30_000, " " * 30_000, "的" * 9_000])
def test_short_and_endless_words(any_tokenizer, text):
    whole = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert np.concatenate(list(ids_in_pieces(any_tokenizer, io.StringIO(text), 3_000))).tolist() == whole


def test_no_more_is_read_than_is_used(tokenizer):
    stream = io.StringIO("Return the value of the key. " * 100_000)
    tracemalloc.start()
    pieces = ids_in_pieces(tokenizer, stream, 4_000)
    assert len(next(pieces)) > 500
    assert stream.tell() <= 3 * 4_000
    for _ in range(20):
        next(pieces)
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
