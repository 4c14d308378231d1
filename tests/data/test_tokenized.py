"""A text is tokenized once."""

import numpy as np

from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.tokenized import tokenized_text
from tests.common import write_jsonl


def test_tokenized_text_is_made_once(tmp_path, tokenizer):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "Return the value."}, {"text": "A class."}])
    corpus = Corpus(source=str(tmp_path / "c.jsonl"))
    text = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, None, 2048)
    parts = np.split(text.tokens, text.ends[:-1])
    assert [tokenizer.decode(part[:-1]) for part in parts] == ["Return the value.", "A class."]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").iterdir()}
    again = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, None, 2048)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "t").iterdir()} == before
    assert np.array_equal(again.tokens, text.tokens)
    tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, 3, 2048)
    assert len(list((tmp_path / "t").iterdir())) == 4
