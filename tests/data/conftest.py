"""What the tests of the data share."""

import pytest

from lightning_kfac.models.loading import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """That of the embedded model."""
    return load_tokenizer("demo")
