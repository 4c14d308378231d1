"""Rows read with a band in pieces, against each token by itself and against a mask over whole rows."""

import pytest
import torch

from lightning_kfac.models import banded
from lightning_kfac.models.banded import banded_argmax, goes_on_in_pieces
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.probes import banded_mask, takes_own_mask
from lightning_kfac.models.tokens import TokenBatch, right_padded
from tests.common import VOCAB, build_model


@pytest.mark.parametrize("size", [1, 3, 5, 64])
@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
@torch.no_grad()
def test_a_band_of_context_is_that_many_tokens(monkeypatch, family, size):
    """In a model of one layer a band of n tokens is the same as running each token with n - 1 before it."""
    monkeypatch.setattr(banded, "PIECE", size)
    model = build_model(family, **({"num_hidden_layers": 1} if family == "olmo2" else {"n_layer": 1}))
    assert takes_own_mask(model) and goes_on_in_pieces(model)
    ids = torch.randint(1, VOCAB, (1, 14), generator=torch.Generator().manual_seed(6))
    found = banded_argmax(model, TokenBatch.from_dict({"input_ids": ids, "dense": False}), context=5)[0]
    for place in range(14):
        first = max(0, place - 4)
        positions = torch.arange(first, place + 1)[None]
        logits = model(ids[:, first : place + 1], position_ids=positions).logits[0, -1]
        assert found[place] == logits.argmax()


@pytest.mark.parametrize("size", [4, 7, 64])
@torch.no_grad()
def test_pieces_are_a_mask_over_whole_rows(monkeypatch, any_model, size):
    """Rows of several lengths in any order; some end where a piece does, and none is told before the first place."""
    monkeypatch.setattr(banded, "PIECE", size)
    draw = torch.Generator().manual_seed(2)
    lengths = [8, 27, 1, 20, 28, 13]
    rows = [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in lengths]
    ids, real = right_padded(rows, torch.device("cpu"))
    batch = TokenBatch.from_dict({"input_ids": ids, "attention_mask": real})
    mask = banded_mask(any_model, 28, 9) if takes_own_mask(any_model) else None
    expected = torch.cat([logits for _, logits in logits_in_slices(any_model, batch, mask=mask)]).argmax(-1).view(6, 28)
    for first in (0, 11):
        found = banded_argmax(any_model, batch, 9, first)
        told = real & (torch.arange(28) >= first)
        assert torch.equal(found[told], expected[told])
