"""The options of the data module."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.modules.text_data import TextData


@pytest.mark.parametrize(
    "wrong", [{"seq_len": 1}, {"batch_size": 0}, {"max_tokens": 0}, {"sets": {"heldout": "x"}}, {"sets": {"a.b": "x"}}]
)
def test_wrong_data_options(wrong):
    with pytest.raises(InputError, match=r"data\."):
        TextData(**wrong)


def test_the_same_documents_as_corpus_and_held_out_text_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text("another")
    for heldout, told in (("a.txt", True), ("b.txt", False)):
        TextData(corpus=str(tmp_path / "a.txt"), heldout=str(tmp_path / heldout)).texts.check()
        assert ("is corpus and held-out text" in capsys.readouterr().err) == told
    TextData(heldout="embedded").texts.check()
    assert not capsys.readouterr().err
