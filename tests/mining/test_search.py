"""The search finds what a loop over windows finds."""

import random

import numpy as np
import pytest
import torch

from lightning_kfac import collect_factors
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.tokenized import TokenizedText
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.mining.search import search
from lightning_kfac.mining.windows import Mining, MiningPieces
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.probes import banded_mask, takes_own_mask
from tests.common import VOCAB, build_model


def recited_text(model, n_documents=6):
    """Documents that the model partly wrote itself, so that some windows are recited."""
    rng, documents = random.Random(0), []
    for _ in range(n_documents):
        document = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(4, 9))]
        for _ in range(3):
            prefix = document[-6:]
            (recital,) = recite(model, [prefix], [[VOCAB - 1] * rng.randrange(4, 12)])
            document += [*recital.continuation, rng.randrange(1, VOCAB)]
        documents.append(document)
    tokens = np.concatenate([[*document, 0] for document in documents]).astype(np.int32)
    return TokenizedText(tokens, np.cumsum([len(d) + 1 for d in documents])), documents


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_exhaustive_search_is_a_loop_over_windows(family):
    model = build_model(family)
    text, documents = recited_text(model)
    pieces = MiningPieces(text, 10, 1, 20)
    result = search(model, list(pieces), 6, 4, likely=None, batch_size=7, max_positions=64)
    expected = {}
    for number, document in enumerate(documents):
        for o in range(len(document) - 9):
            (recital,) = recite(model, [document[o : o + 6]], [document[o + 6 :]])
            if recital.matched >= 4:
                expected[number, o] = recital.matched
    assert {(f.document, f.offset): f.match_length for f in result.found} == expected and expected
    assert result.windows == result.checked == sum(max(0, len(d) - 9) for d in documents)
    for f in result.found:
        window = documents[f.document][f.offset : f.offset + 10]
        assert (f.prefix_ids, f.suffix_ids) == (window[:6], window[6:])
    # The long forward: no window that it leaves out is likely, none that it checks is judged otherwise.
    for likely in (0.5, 1.0):
        quick = search(model, list(pieces), 6, 4, likely=likely, batch_size=7, max_positions=64)
        assert all(f in result.found for f in quick.found) and quick.checked < result.checked
        assert quick.windows == result.windows


def test_a_window_with_an_end_of_text_in_it_is_no_recitation():
    """What follows the end was never read; both ways leave such windows out."""
    model = build_model("olmo2")
    text, _ = recited_text(model)
    for likely in (None, 0.0):
        pieces = list(MiningPieces(text, 10, 1, 20))
        every = search(model, pieces, 6, 4, likely=likely, batch_size=7, max_positions=64)
        ending = {every.found[0].suffix_ids[0]}
        found = search(model, pieces, 6, 4, likely=likely, batch_size=7, max_positions=64, end_of_text=ending).found
        assert found != every.found
        assert {f[:2] for f in found} == {f[:2] for f in every.found if not ending & {*f.prefix_ids, *f.suffix_ids}}


def test_search_of_nothing():
    assert search(build_model("olmo2"), [], 6, 4, likely=0.5, batch_size=2) == ([], 0, 0, 0)


@pytest.mark.parametrize("before", [0, 16, 112])
def test_prefilter_finds_all_that_the_demo_memorized(demo_model, before):
    """Planted passages at the beginning of documents or with other text before them: recall 1 against every window."""
    tokenizer = load_tokenizer("demo")
    rows = load_memorized("demo:planted_report.jsonl", tokenizer, 2048)[:6]
    filler = tokenizer("Return the value for key if key is in the dictionary, else default. " * 12)["input_ids"]
    front = tokenizer("A list of strings. The name of the file, or None where there is none. " * 12)["input_ids"]
    documents = [
        [*front[:before], *row.prefix, *row.suffix, *filler[: 20 * number], 0] for number, row in enumerate(rows)
    ]
    text = TokenizedText(np.concatenate(documents).astype(np.int32), np.cumsum([len(d) for d in documents]))
    pieces = list(MiningPieces(text, 112, 16, 256))
    options = {"batch_size": 16, "end_of_text": {0}, "max_positions": 1024}
    every = search(demo_model, pieces, 64, 48, likely=None, **options)
    quick = search(demo_model, pieces, 64, 48, likely=Mining().likely, **options)
    assert {(f.document, f.offset) for f in every.found} >= {(number, before) for number in range(6)}
    assert quick.found == every.found and quick.checked < every.checked


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_windows_by_their_share_in_flat_directions(family):
    """Against a loop over windows, of pieces in one batch; without a mask of its own a token sees all before it."""
    model = build_model(family, torch.float64)
    text, documents = recited_text(model)
    pieces = list(MiningPieces(text, 10, 3, 20))
    factors = collect_factors(model, [{"input_ids": torch.arange(1, 61).view(4, 15)}], projections=["up"])
    bulk = BulkShare(model, factors, control=False)
    own = {}
    for piece in pieces:
        for offset in piece.offsets.tolist():
            ids = torch.from_numpy(piece.tokens[: offset + 10].astype(np.int64))[None]
            mask = banded_mask(model, ids.shape[1], 8) if takes_own_mask(model) else None
            with bulk.listening() as heard, torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
            shares = heard.shares(torch.tensor([offset + 5]), torch.tensor([4]), ids.shape[1])
            window = piece.document, piece.start + offset
            own[window] = sum(share[0, 0].item() for share in shares.values()) / len(shares)
    every = search(model, pieces, 6, 4, likely=None, batch_size=7, max_positions=64)
    middle = sorted(own.values())[len(own) // 2] + 1e-9
    found = search(model, pieces, 6, 4, likely=None, batch_size=7, max_positions=64, bulk=bulk, least_bulk=middle)
    high = {window for window, share in own.items() if share >= middle}
    assert found.windows == every.windows == len(own) and found.checked == len(high) < len(own)
    assert [f for f in every.found if f[:2] in high] == found.found and len(documents) == 6
    assert search(model, [], 6, 4, likely=None, batch_size=2, bulk=bulk, least_bulk=0.5) == ([], 0, 0, 0)


def test_flat_directions_find_what_the_demo_memorized(demo_model):
    """Planted passages, each before a passage that the model never saw; factors of others of these."""
    tokenizer = load_tokenizer("demo")
    rows = load_memorized("demo:planted_report.jsonl", tokenizer, 2048)[:6]
    unseen = [[*row.prefix, *row.suffix] for row in load_memorized("demo:unseen.jsonl", tokenizer, 2048)]
    documents = [[*row.prefix, *row.suffix, *ids, 0] for row, ids in zip(rows, unseen[:6], strict=True)]
    text = TokenizedText(np.concatenate(documents).astype(np.int32), np.cumsum([len(d) for d in documents]))
    pieces = list(MiningPieces(text, 112, 16, 256))
    factors = collect_factors(demo_model, [{"input_ids": torch.tensor(unseen[6:46])}], blocks=[4], projections=["up"])
    bulk = BulkShare(demo_model, factors, control=False)
    options = {"batch_size": 16, "end_of_text": {0}, "max_positions": 1024, "likely": None}
    every = search(demo_model, pieces, 64, 48, **options)
    quick = search(demo_model, pieces, 64, 48, bulk=bulk, least_bulk=0.25, **options)
    assert {(f.document, f.offset) for f in quick.found} >= {(number, 0) for number in range(6)}
    assert all(f in every.found for f in quick.found) and quick.checked < every.checked
