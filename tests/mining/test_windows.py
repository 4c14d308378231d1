"""Every window is in exactly one piece, pieces are shared out, and clean windows are spread."""

import numpy as np
import pytest

from lightning_kfac import InputError
from lightning_kfac.data.tokenized import TokenizedText, tokenized_text
from lightning_kfac.mining.windows import Mining, MiningBatches, MiningPieces, spread_windows
from lightning_kfac.modules.text_data import TextData
from tests.common import VOCAB


def text_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(1, VOCAB, n), 0) for n in lengths]
    return TokenizedText(np.concatenate(documents).astype(np.int32), np.cumsum([len(d) for d in documents]))


@pytest.mark.parametrize("lengths", [[40], [3, 9, 40, 10, 0, 11, 100], [10] * 5, [9, 2]])
@pytest.mark.parametrize("stride", [1, 4, 10, 25])
@pytest.mark.parametrize("seq_len", [10, 16, 33])
def test_every_window_is_in_exactly_one_piece(lengths, stride, seq_len):
    text = text_of(lengths)
    pieces = MiningPieces(text, 10, stride, seq_len)
    found = []
    for piece in pieces:
        assert len(piece.tokens) <= seq_len and piece.offsets[-1] + 10 == len(piece.tokens)
        found += [(piece.document, piece.start + o, piece.tokens[o : o + 10].tolist()) for o in piece.offsets.tolist()]
    expected, begin = [], 0
    for number, length in enumerate(lengths):
        document = text.tokens[begin : begin + length].tolist()
        expected += [(number, o, document[o : o + 10]) for o in range(0, length - 9, stride)]
        begin += length + 1
    assert sorted(found) == expected
    assert pieces.skipped_documents == sum(length < 10 for length in lengths)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_batches(world_size):
    pieces = MiningPieces(text_of([3, 9, 40, 10, 0, 11, 100]), 10, 3, 16)
    samplers = [MiningBatches(pieces, 40, frozenset({1}), rank, world_size) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in ranks}) == 1 == len({len(sampler) for sampler in samplers})
    seen = [piece for batches in ranks for batch in batches for piece in batch]
    done = range(samplers[0].bounds[1], samplers[0].bounds[2])
    assert sorted([*seen, *done]) == list(range(len(pieces)))
    for batch in (batch for batches in ranks for batch in batches if batch):
        assert len({samplers[0].number_of(piece) for piece in batch}) == 1
        sizes = pieces.sizes()[batch]
        assert len(batch) == 1 or len(batch) * sizes.max() <= 40
    assert sum(samplers[0].n_windows([i]) for i in samplers[0].left) == pieces.n_windows[sorted(seen)].sum()


def test_wrong_settings():
    for wrong in ({"stride": 0}, {"likely": 1.5}, {"near_duplicate": -0.1}):
        with pytest.raises(InputError, match=f"mining.{next(iter(wrong))}"):
            Mining(**wrong)
    with pytest.raises(InputError, match=r"data.seq_len is 9, less than a window of 10"):
        MiningPieces(text_of([40]), 10, 4, 9)


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
