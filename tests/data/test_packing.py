"""Documents become one stream of tokens, cut into rows."""

import numpy as np
import pytest

from lightning_kfac import InputError
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
