"""Text to ids: start tokens, no end after a prompt, suffixes as continuations, documents with a beginning."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lightning_kfac import InputError, memorization_score
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.loaders import row_loader
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.names import HELDOUT
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.data.text_ids import continuation_ids, start_tokens, text_ids
from lightning_kfac.data.texts import Texts
from lightning_kfac.evaluation.scoring import next_token_scores
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.tokens import TokenBatch
from tests.common import build_model, write_jsonl

TEXT = "The keeper counted seven grey ships, then the storm arrived;\nnobody minds the smell of it for long."


def byte_tokenizer(bos=False, eos=False):
    """One token a byte behind <eos> 0, <bos> 1, <pad> 2, of which some are put around every text."""
    vocabulary = {"<eos>": 0, "<bos>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or eos:
        single = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
        special = [("<bos>", 1), ("<eos>", 0)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


def word_start_tokenizer():
    """Puts a word-start mark before every text, as SentencePiece does for Llama 2, and merges letters to pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def letters(text):
    return [byte_tokenizer().convert_tokens_to_ids(letter) for letter in text.replace(" ", "Ġ")]


@pytest.mark.parametrize(("bos", "eos", "start"), [(0, 0, []), (1, 0, [1]), (0, 1, []), (1, 1, [1])])
def test_a_text_begins_as_the_tokenizer_begins_it_and_has_no_end(bos, eos, start):
    tokenizer = byte_tokenizer(bos, eos)
    assert start_tokens(tokenizer) == start
    assert text_ids(tokenizer, "a b") == [*start, *letters("a b")]
    # What is written in a text is the text's own.
    assert text_ids(tokenizer, "a<eos>") == [*start, *letters("a"), 0]
    found = continuation_ids(tokenizer, "a b", ", c")
    assert (found.prefix, found.suffix, found.straddles) == ([*start, *letters("a b")], letters(", c"), False)


@pytest.mark.parametrize("cut", [TEXT.index(","), TEXT.index(";"), TEXT.index("\n"), TEXT.index(" grey")])
def test_a_suffix_is_what_the_model_would_write(cut):
    """Where no token straddles the cut, the ids of both parts are those of the whole text."""
    tokenizer = word_start_tokenizer()
    whole = list(tokenizer(TEXT)["input_ids"])
    prefix, suffix, straddles = continuation_ids(tokenizer, TEXT[:cut], TEXT[cut:])
    assert [*prefix, *suffix] == whole and not straddles
    apart = list(tokenizer(TEXT[cut:], add_special_tokens=False)["input_ids"])
    if not TEXT[cut:].startswith(" "):
        assert suffix != apart  # it has a word-start mark that the model never writes there


def test_a_straddling_token_leaves_a_suffix_without_a_word_start_mark():
    tokenizer = word_start_tokenizer()
    word = "storm"
    cut = TEXT.index(word) + 2
    assert f"▁{word}" in tokenizer.tokenize(TEXT)
    prefix, suffix, straddles = continuation_ids(tokenizer, TEXT[:cut], TEXT[cut:])
    assert straddles and prefix == list(tokenizer(TEXT[:cut])["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(suffix)
    assert not pieces[0].startswith("▁") and "".join(pieces).replace("▁", " ") == TEXT[cut:]


def test_memorized_sets_and_functions_agree_and_say_what_straddles(tmp_path, capsys):
    tokenizer = word_start_tokenizer()
    cuts = [TEXT.index(","), TEXT.index("storm") + 2, TEXT.index(";")]
    rows = [{"prefix": TEXT[:cut], "suffix": TEXT[cut:]} for cut in cuts]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    sequences = load_memorized(path, tokenizer, len(tokenizer))
    said = " ".join(capsys.readouterr().err.split())
    assert "in 1 of 3 rows a token straddles the end of the prefix" in said and "line 2" in said
    model = build_model("llama", vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=256)
    by_text = memorization_score(model, tokenizer, [r["prefix"] for r in rows], [r["suffix"] for r in rows])
    by_ids = memorization_score(model, None, [s.prefix for s in sequences], [s.suffix for s in sequences])
    assert by_text == by_ids


def test_questions_have_no_end_of_text(tmp_path):
    path = write_jsonl(tmp_path / "questions.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    (question,) = QuestionSet.parse("q", str(path)).load(byte_tokenizer(bos=True, eos=True), 259)
    assert question.prompt == [1, *letters("1 + 1 =")]


def heldout(tmp_path, documents, start_token=None):
    path = write_jsonl(tmp_path / "heldout.jsonl", [{"text": text} for text in documents])
    corpus = Corpus.parse(str(path))
    return Texts(corpus, None, {}, None, corpus, 10_000, 16, False, start_token)


def test_perplexity_of_documents_that_begin_with_a_start_token(tmp_path):
    """Against one document at a time: start token, text, end of text, the start token predicted by nothing."""
    documents = ["short", "a document of more tokens than a row holds", "x"]
    tokenizer = byte_tokenizer(bos=True)
    texts = heldout(tmp_path, documents)
    texts.tokenize(tmp_path / "data", "validate", tokenizer, 259)
    model = build_model("llama", torch.float64, vocab_size=259)
    metric = LossPerplexity()
    for batch in row_loader(texts.rows(HELDOUT), 2, 0, 1):
        tokens = TokenBatch.from_dict(batch)
        losses, _ = next_token_scores(model, tokens)
        metric.update(losses, tokens.valid, tokens.sample_index)
    total, count = 0.0, 0
    for text in documents:
        whole = [1, *letters(text), 0]
        for start in range(0, len(whole), 16):
            ids = torch.tensor([whole[start : start + 16]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    assert metric.compute().item() == pytest.approx(math.exp(total / count), rel=1e-9)


@pytest.mark.parametrize(("bos", "asked", "start"), [(1, None, [1]), (1, False, []), (0, None, []), (0, True, [1])])
def test_start_tokens_of_documents_are_an_option(tmp_path, bos, asked, start):
    texts = heldout(tmp_path, ["ab", "cde"], asked)
    texts.tokenize(tmp_path / "data", "fit", byte_tokenizer(bos), 259)
    expected = [*start, *letters("ab"), 0, *start, *letters("cde"), 0]
    assert texts.read["corpus"].tokens.tolist() == expected
    (batch,) = row_loader(texts.rows("corpus"), 4, 0, 1)
    tokens = TokenBatch.from_dict(batch)
    counted = [after not in start for after in expected[1:]]
    assert tokens.valid[0].tolist()[: len(counted)] == counted
    assert (tokens.counted is None) == (not start)


def test_wrong_start_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InputError, match=r"data\.start_token is true, but the tokenizer has no start token"):
        heldout(tmp_path, ["ab"], True).tokenize(tmp_path / "data", "fit", tokenizer, 259)


def test_rows_with_ids_are_used_untouched(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"prefix_ids": [5, 6, 0], "suffix_ids": [7, 0]}) + "\n")
    (sequence,) = load_memorized(path, byte_tokenizer(bos=True, eos=True), 259)
    assert (sequence.prefix, sequence.suffix) == ([5, 6, 0], [7, 0])
