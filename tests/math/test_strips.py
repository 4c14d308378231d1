"""Cells of a strip against a loop over tokens."""

import math
import random

import numpy as np

from lightning_kfac.math import strips
from lightning_kfac.math.strips import covered, most_extracted, strips_of


def columns_of(windows):
    document, start, log_p = zip(*windows, strict=True)
    return {"document": np.array(document), "start": np.array(start), "log_p": np.array(log_p, dtype=float)}


def test_cells_hold_the_likeliest_window_that_touches_them(monkeypatch):
    monkeypatch.setattr(strips, "CELLS", 40)
    rng = random.Random(0)
    for n_tokens in (23, 40, 57, 400):
        starts = sorted(rng.sample(range(n_tokens - 12), 6))
        log_p = [rng.choice([math.nan, -math.inf, -rng.random() * 20]) for _ in starts]
        columns = columns_of([(7, s, p) for s, p in zip(starts, log_p, strict=True)] + [(3, 0, 0.0)])
        (strip,) = strips_of({7: ("a", n_tokens)}, {"": lambda columns=columns: iter([columns])}, 8, 4)
        cells = strip.stages[""]
        count = min(40, n_tokens)
        expected, asked = [math.nan] * count, [False] * count
        for start, p in zip(starts, log_p, strict=True):
            for token in range(start + 8, start + 12):
                cell = token * count // n_tokens
                asked[cell] = True
                if not math.isnan(p) and not expected[cell] >= p / math.log(10):
                    expected[cell] = p / math.log(10)
        assert cells.asked.tolist() == asked
        np.testing.assert_allclose(cells.log10_p, expected)


def test_documents_of_which_most_is_extracted_are_drawn():
    before = [columns_of([(0, 0, -1.0), (1, 0, math.nan), (2, 0, -9.0)]), columns_of([(1, 16, -0.1)])]
    after = [columns_of([(2, 0, 0.0), (2, 16, 0.0), (0, 0, -math.inf)])]
    assert most_extracted([iter(before), iter(after)], 4) == [0, 1, 2, 3]
    many = columns_of([(n, 0, -float(n)) for n in range(30)])
    assert most_extracted([iter([many])], 30) == list(range(12))
    drawn = strips_of(
        {2: ("c", 99), 3: ("d", 99)}, {"before": lambda: iter(before), "after": lambda: iter(after)}, 4, 4
    )
    assert [strip.name for strip in covered(drawn)] == ["c"] and list(drawn[0].stages) == ["before", "after"]
