"""Documents become one stream of tokens, cut into rows."""

from itertools import chain

import numpy as np
import pytest

from lightning_kfac import InputError
from lightning_kfac.data.documents import TextFile, TokenIds
from lightning_kfac.data.packing import row_offsets, tokenize_documents


def test_documents_are_joined_with_eos_to_an_exact_budget(tokenizer):
    texts = ["Return the value.", "A class.", "Another piece of text."]
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for budget in (None, 7, 10_000, len(ids), len(ids) - 1):
        documents = list(tokenize_documents(texts, tokenizer, budget))
        assert np.concatenate(documents).tolist() == ids[:budget]
        assert all(document[-1] == tokenizer.eos_token_id for document in documents[:-1])
    assert row_offsets(10, 4).tolist() == [0, 4, 8, 10]
    assert row_offsets(8, 4).tolist() == [0, 4, 8]


def test_no_document_is_read_beyond_the_budget(tokenizer):
    read = []

    def stream():
        for i in range(10_000):
            read.append(i)
            yield "some text that takes a few tokens"

    list(tokenize_documents(stream(), tokenizer, 100))
    assert len(read) <= 256


def test_wrong_empty_corpus(tokenizer):
    with pytest.raises(InputError, match="no text"):
        list(tokenize_documents([], tokenizer, None))


def long_texts(count=12, words=900):
    """Texts of numbered words, in lines of nine."""
    return [
        "\n".join(" ".join(f"w{n}x{i}" for i in range(line, line + 9)) for line in range(0, words, 9))
        for n in range(count)
    ]


def test_a_document_gives_no_more_than_its_share(tokenizer):
    texts = [*long_texts(), "Return the value."]
    eos = tokenizer.eos_token_id
    found = list(tokenize_documents(texts, tokenizer, None, most=60))
    assert [len(ids) for ids in found[:-1]] == [60] * 12 and found[-1].tolist() == [
        *tokenizer("Return the value.")["input_ids"], eos
    ]  # fmt: skip
    begins = []
    for text, ids in zip(texts, found, strict=True):
        stretch = tokenizer.decode(ids[:-1])
        assert ids[-1] == eos and stretch in text and (text.find(stretch) == 0 or text[text.find(stretch) - 1] == "\n")
        begins.append(text.find(stretch) / len(text))
    assert len(set(begins)) > 9 and max(begins) > 0.5  # from anywhere in them
    again = list(tokenize_documents(texts, tokenizer, None, most=60))
    assert all(map(np.array_equal, found, again))
    budget = list(tokenize_documents(texts, tokenizer, 200, most=60))
    assert np.concatenate(budget).tolist() == np.concatenate(found).tolist()[:200]


def test_texts_in_files_are_as_those_in_memory(tokenizer, tmp_path):
    texts = long_texts(3, 9_000)
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    files = [TextFile(tmp_path / f"{number}.txt") for number in range(3)]
    for budget, most in ((None, None), (50_000, None), (1000, None), (1000, 400), (None, 700)):
        in_memory = list(tokenize_documents(texts, tokenizer, budget, most=most))
        in_files = list(tokenize_documents(files, tokenizer, budget, most=most))
        assert len(in_memory) == len(in_files) and all(map(np.array_equal, in_memory, in_files))
    whole = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert [ids.tolist() for ids in tokenize_documents(files, tokenizer, None)] == whole
    assert np.concatenate(list(tokenize_documents(files, tokenizer, 900))).tolist() == list(chain(*whole))[:900]


def test_token_ids_are_used_as_they_are(tokenizer):
    eos = tokenizer.eos_token_id
    given = [TokenIds([5, 6, eos]), TokenIds(np.array([7, 8], np.uint16)), TokenIds([eos]), "Return the value."]
    text = tokenizer("Return the value.")["input_ids"]
    found = [ids.tolist() for ids in tokenize_documents(given, tokenizer, None)]
    assert found == [[5, 6, eos], [7, 8, eos], [*text, eos]]
    begun = [TokenIds([9, 5, 6, eos]), TokenIds([5, 6])]
    assert [ids.tolist() for ids in tokenize_documents(begun, tokenizer, None, start=[9])] == [[9, 5, 6, eos]] * 2
    (cut,) = tokenize_documents([TokenIds(np.arange(10, 1010))], tokenizer, None, most=20)
    assert len(cut) == 20 and cut[-1] == eos and (np.diff(cut[:-1]) == 1).all()


def test_texts_without_a_token_are_left_out(tokenizer):
    assert [len(ids) for ids in tokenize_documents(["", "a", ""], tokenizer, None)] == [2]
    with pytest.raises(InputError, match="no text"):
        list(tokenize_documents(["", ""], tokenizer, None))


def test_progress_is_shown_within_a_document(tokenizer):
    counts = []
    found = list(tokenize_documents(long_texts(1, 90_000), tokenizer, 100_000, counts.append))
    assert counts == sorted(counts) and len(counts) > 2 and counts[-1] == sum(map(len, found))


def test_no_more_is_tokenized_than_may_be_used(tokenizer):
    """Of 400 texts of 12,000 tokens, a few characters of those that make up the budget are."""
    text = "Return the value for key if key is in the dictionary. " * 1000
    tokenized = []

    class Counting(type(tokenizer)):
        def __call__(self, texts, **options):
            tokenized.extend([texts] if isinstance(texts, str) else texts)
            return super().__call__(texts, **options)

    counting = Counting(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    for most, budget in ((150, 3000), (None, 3000)):
        tokenized.clear()
        found = list(tokenize_documents([text] * 400, counting, budget, most=most))
        assert sum(map(len, found)) == budget
        assert sum(map(len, tokenized)) < 12 * 4 * budget
    tokenized.clear()
    list(tokenize_documents(["Return the value of the key."] * 400, counting, 100))
    assert len(tokenized) < 30
