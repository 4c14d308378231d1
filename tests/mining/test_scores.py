"""Probabilities of windows: against each window read by itself; a file of any length is written in the same memory."""

import math
import tracemalloc

import numpy as np
import pytest

from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.metrics.functional import Decoding
from lightning_kfac.mining.scores import Scores, about_windows, read_windows, write_windows
from lightning_kfac.mining.search import search
from lightning_kfac.mining.windows import MiningPieces
from tests.common import build_model
from tests.mining.test_search import recited_text

SCHEME = Decoding(1.5, 30)


def scored(model, pieces, likely):
    scores = Scores(SCHEME)
    search(model, pieces, 6, 4, likely=likely, batch_size=7, max_positions=64, scores=scores)
    return {(d, s): (p, strict) for d, s, p, strict in zip(*scores.columns.values(), strict=True)}


def test_every_window_has_its_own_probability():
    model = build_model("olmo2")
    text, documents = recited_text(model)
    expected = {}
    for number, document in enumerate(documents):
        for start in range(0, len(document) - 9, 2):
            window = document[start : start + 10]
            (alone,) = recite(model, [window[:6]], [window[6:]], decoding=SCHEME)
            expected[number, start] = alone.log_p, alone.strict
    pieces = MiningPieces(text, 10, 2, 16)
    every = scored(model, list(pieces), None)
    assert every.keys() == expected.keys()
    for place, (log_p, strict) in expected.items():
        assert every[place] == (pytest.approx(log_p, abs=1e-4), strict)
    assert {strict for _, strict in every.values()} == {True, False}
    # What the long forward finds unlikely is not measured, which is no probability.
    some = scored(model, list(pieces), 1.0)
    left_out = [place for place, (log_p, _) in some.items() if log_p is None]
    assert left_out and len(left_out) < len(some) == len(every)
    for place, found in some.items():
        assert found == (
            (None, None) if place in left_out else (pytest.approx(every[place][0], abs=1e-4), every[place][1])
        )
    # But what an earlier search has measured is measured again.
    document, start = np.array(left_out[:3]).T
    pieces.check_again([{"document": document, "start": start, "log_p": np.array([0, -math.inf, -9.0])}])
    again = scored(model, list(pieces), 1.0)
    assert [place for place, (log_p, _) in again.items() if log_p is None] == left_out[3:]


def test_windows_of_another_corpus_are_refused():
    text, _ = recited_text(build_model("olmo2"))
    pieces = MiningPieces(text, 10, 2, 16)
    for document, start in ((0, 1), (99, 0), (0, 1000)):
        columns = {"document": np.array([document]), "start": np.array([start]), "log_p": np.array([-1.0])}
        with pytest.raises(InputError, match=r"mining\.before holds windows that this corpus lacks"):
            pieces.check_again([columns])


def batches(count, rows=400):
    for number in range(count):
        starts = list(range(number * rows * 16, (number + 1) * rows * 16, 16))
        log_p = [None if i % 3 == 0 else -math.inf if i % 3 == 1 else -0.5 * i for i in range(rows)]
        strict = [None if p is None else p > -9 for p in log_p]
        yield {"document": [0] * rows, "start": starts, "log_p": log_p, "strict": strict}


def test_what_is_written_is_read(tmp_path):
    write_windows(tmp_path / "w.parquet", batches(3), {"stride": 16})
    (columns,) = read_windows(tmp_path / "w.parquet")
    wanted = [p for b in batches(3) for p in b["log_p"]]
    assert columns["log_p"].tolist() == pytest.approx([math.nan if p is None else p for p in wanted], nan_ok=True)
    assert columns["start"].tolist() == list(range(0, 1200 * 16, 16)) and about_windows(tmp_path / "w.parquet") == {
        "stride": 16
    }
    with pytest.raises(InputError, match=r"no such file; `predict` writes it"):
        about_windows(tmp_path / "other.parquet")


def test_a_damaged_file_is_named(tmp_path):
    """A bit of it flipped, or its end lost: it is refused, or has the same figures all the same."""
    path = tmp_path / "w.parquet"
    write_windows(path, batches(1), {"stride": 16})
    whole = path.read_bytes()
    (wanted,) = read_windows(path)
    refused = 0
    damaged = [whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :] for n in range(0, len(whole), 3)]
    damaged += [whole[:n] for n in range(0, len(whole), 100)]
    for contents in damaged:
        path.write_bytes(contents)
        try:
            about_windows(path)
            (found,) = read_windows(path)
        except InputError as error:
            refused += str(path) in str(error)
        else:
            assert all(np.array_equal(found[name], wanted[name], equal_nan=True) for name in wanted)
    assert refused > 0.7 * len(damaged)


def test_memory_does_not_grow_with_the_document(tmp_path):
    """A document of 5 million tokens beside one of 25 million."""
    peaks = []
    for count in (800, 4000):
        tracemalloc.start()
        write_windows(tmp_path / f"{count}.parquet", batches(count), {})
        read = sum(len(columns["start"]) for columns in read_windows(tmp_path / f"{count}.parquet"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert read == 400 * count
    assert peaks[1] < 1.1 * peaks[0]
