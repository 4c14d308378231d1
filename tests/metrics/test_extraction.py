"""The metric Extraction against fractions counted by hand, and its place among the others."""

import math

import pytest
import torch

from lightning_kfac.math.statistics import interval, paired_difference, wilson
from lightning_kfac.metrics import Extraction
from lightning_kfac.metrics.described import Measures, Setting
from lightning_kfac.metrics.extraction import CHANCES, CURVE, TRIES
from lightning_kfac.metrics.functional import Decoding, expected_share
from lightning_kfac.reporting.labels import OF_A_SET, OF_EXTRACTION, SWEEP_COLUMNS

P = [0.9, 0.5, 0.1, 0.02, 0.0015, 1e-7, 0.0]
LOG_P = [math.log(p) if p else -math.inf for p in P]


def test_figures_are_counted():
    metric = Extraction()
    metric.update(LOG_P[4:], [4, 5, 6])
    metric.update(torch.tensor(LOG_P[:4], dtype=torch.float64), [0, 1, 2, 3])
    found = metric.compute()
    assert set(found) == set(metric.labels) == set(OF_EXTRACTION)
    for n in TRIES:
        assert found[f"extraction.expected_at.{n}"].item() == pytest.approx(sum(1 - (1 - p) ** n for p in P) / 7)
    for p in CHANCES:
        figure = metric.figures[f"extraction.share_p.{p}"]
        assert figure.value == sum(x >= float(p) for x in P) / 7
        assert interval(figure) == wilson(round(7 * figure.value), 7)
    assert found["extraction.median_log10_p"].item() == pytest.approx(math.log10(0.02))
    assert metric.numbers.tolist() == list(range(7))
    assert CURVE[0] == 1 and CURVE[-1] == 10**6 and {10, 100, 1000} < set(CURVE)
    log_p = torch.tensor(LOG_P, dtype=torch.float64)
    assert metric.curve == [pytest.approx(expected_share(log_p, n), rel=1e-12) for n in CURVE]


def test_the_change_is_paired():
    before, after = Extraction(), Extraction()
    before.update(LOG_P)
    after.update([x - 2 for x in LOG_P])
    for metric in (before, after):
        metric.compute()
    for name in before.figures:
        change, low, high = paired_difference(before.figures[name], after.figures[name])
        assert low <= change <= high <= 0 or math.isnan(low)
        assert change == pytest.approx(after.figures[name].value - before.figures[name].value)
    assert change < 0


def test_few_figures_are_rows_of_tables():
    assert [name for name in OF_A_SET if name in OF_EXTRACTION] == [f"extraction.expected_at.{n}" for n in TRIES]
    assert [name for name in SWEEP_COLUMNS if name in OF_EXTRACTION] == ["extraction.expected_at.1000"]


def test_what_an_evaluation_asks_for():
    scheme = Decoding(0.5, None, 0.9)
    settings = [Setting(m, set(), False, False) for m in (Measures(extraction=scheme), Measures(extraction=None))]
    wanted, unwanted = map(Extraction.asked, settings)
    assert wanted.settings == {"extraction.temperature": 0.5, "extraction.top_k": None, "extraction.top_p": 0.9}
    assert unwanted is None
