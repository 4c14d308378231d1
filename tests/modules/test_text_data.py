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
