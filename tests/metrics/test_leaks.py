"""The metric Membership against counted pairs, and its place among the others."""

import math

import pytest
import torch

from lightning_kfac.math.separation import auc_difference, auc_interval
from lightning_kfac.math.statistics import interval, paired_difference
from lightning_kfac.metrics import Membership
from lightning_kfac.metrics.described import Measures, Setting
from lightning_kfac.metrics.functional import Leaks
from lightning_kfac.metrics.leaks import SCORES
from lightning_kfac.reporting.labels import METRICS, OF_GENERAL, OF_LEAKS, SWEEP_COLUMNS
from tests.common import generator

MEMBERS = torch.randn(7, len(SCORES), generator=generator(), dtype=torch.float64) + 0.5
OTHERS = torch.randn(9, len(SCORES), generator=generator(1), dtype=torch.float64)


def scores(values):
    return [dict(zip(SCORES, row, strict=True)) for row in values.tolist()]


def fed(members=MEMBERS, others=OTHERS):
    """In several parts, out of order."""
    metric = Membership()
    metric.update(scores(others[4:]), member=False, index=range(4, len(others)))
    metric.update(scores(members), member=True, index=range(len(members)))
    metric.update(scores(others[:4]), member=False, index=range(4))
    return metric, metric.compute()


def test_every_measure_tells_members_by_its_own_sign():
    metric, found = fed()
    assert set(found) == set(metric.labels) <= set(METRICS)
    assert [name for name, measure in SCORES.items() if measure.sign < 0] == ["loss", "zlib", "reference"]
    for number, (name, measure) in enumerate(SCORES.items()):
        members = [measure.sign * x for x in MEMBERS[:, number].tolist()]
        others = [measure.sign * x for x in OTHERS[:, number].tolist()]
        pairs = [m > o for m in members for o in others]
        assert found[f"leaks.{name}.auc"].item() == pytest.approx(sum(pairs) / 63)
        best = sum(m > max(others) for m in members) / 7
        assert found[f"leaks.{name}.tpr_at_fpr_0.01"].item() == pytest.approx(best)
        low, high = auc_interval(members, others)
        assert interval(metric.figures[f"leaks.{name}.auc"]) == pytest.approx((low, high))
        beside = {
            key.split(".")[2]: value for key, value in metric.settings.items() if key.startswith(f"leaks.{name}.")
        }
        means = MEMBERS[:, number].mean().item(), OTHERS[:, number].mean().item()
        assert beside == pytest.approx(
            {"low": low, "high": high, "mean_members": means[0], "mean_nonmembers": means[1]}
        )
    assert metric.settings["leaks.members"] == 7 and metric.settings["leaks.nonmembers"] == 9
    assert metric.settings["leaks.k"] == 0.2


def test_numbers_of_texts_in_turn():
    numbered, _ = fed()
    plain = Membership()
    for part, member in ((MEMBERS[:3], True), (OTHERS, False), (MEMBERS[3:], True)):
        plain.update(scores(part), member)
    assert plain.compute().keys() == numbered.labels.keys()
    assert plain.numbers.tolist() == numbered.numbers.tolist() == [*range(-9, 0), *range(7)]
    for name, figure in plain.figures.items():
        assert figure.sums.equal(numbered.figures[name].sums)


def test_the_change_is_paired():
    before, _ = fed()
    after, _ = fed(MEMBERS - 1.0)
    for name in before.figures:
        assert paired_difference(before.figures[name], after.figures[name]) == auc_difference(
            before.figures[name].classes, after.figures[name].classes
        )


def test_what_was_not_scored_has_no_figure():
    metric = Membership()
    metric.update([{"loss": 1.0}], member=True)
    metric.update([{"loss": 2.0}], member=False)
    assert set(metric.compute()) == {"leaks.loss.auc", "leaks.loss.tpr_at_fpr_0.01"}
    assert math.isnan(metric.settings["leaks.loss.low"]) and metric.settings["leaks.loss.mean_members"] == 1.0


def test_one_class_and_none():
    metric = Membership()
    metric.update([], member=True)
    assert metric.compute() == {} and metric.settings == {}
    metric.update([{"loss": 1.0}, {"loss": 2.0}], member=True)
    assert all(map(math.isnan, metric.compute().values()))
    assert all(map(math.isnan, interval(metric.figures["leaks.loss.auc"])))


def test_few_figures_stand_in_common_tables():
    assert not [name for name in OF_GENERAL if name.startswith("leaks.")]
    assert [name for name in SWEEP_COLUMNS if name.startswith("leaks.")] == ["leaks.loss.auc"]
    assert list(OF_LEAKS) == list(SCORES)


def test_what_an_evaluation_asks_for():
    setting = Setting(Measures(leaks=Leaks(k=0.5)), set(), False, False)
    metric = Membership.asked(setting)
    metric.update([{"loss": 1.0}], member=True)
    metric.compute()
    assert metric.settings["leaks.k"] == 0.5
