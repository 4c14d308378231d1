"""Windows of a text."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.tokenized import tokenized_text
from lightning_kfac.mining.windows import spread_windows
from lightning_kfac.modules.text_data import TextData


def test_clean_windows_are_spread_over_the_heldout_text(tmp_path):
    data = TextData(
        heldout="embedded", heldout_tokens=20_000, clean_windows=9, prefix_len=20, suffix_len=8, tokenizer="demo"
    )
    text = tokenized_text(tmp_path, "heldout", data.heldout, data.tokenizer, 20_000, 2048)
    windows = spread_windows(text, 9, *data.window)
    assert len({tuple(w.prefix) for w in windows}) == 9
    stream = text.tokens.tolist()
    for window in windows:
        ids = [*window.prefix, *window.suffix]
        assert (len(window.prefix), len(window.suffix)) == (20, 8) and 0 not in ids
        assert any(stream[i : i + 28] == ids for i in range(len(stream)))
    with pytest.raises(InputError, match=r"clean_windows is 100000, but the held-out text holds"):
        spread_windows(text, 100_000, *data.window)
    for wrong in ({"clean_windows": 5}, {"clean_windows": 5, "heldout": "embedded", "sets": {"clean": "x"}}):
        with pytest.raises(InputError, match=r"data\.clean_windows needs"):
            TextData(**wrong)
