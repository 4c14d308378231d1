"""Mixtures and unions against loops over components and over every share."""

import math

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.math.mixing import add_factors, add_scores, mass_before, union_of_count
from lightning_kfac.math.selection import select_components
from tests.common import generator


def importances(n, shape=(3, 4), ties=False):
    if ties:
        return [torch.randint(0, 4, shape, generator=generator(s)).double() for s in range(n)]
    return [torch.rand(shape, generator=generator(s), dtype=torch.float64) for s in range(n)]


# -- sums --------------------------------------------------------------------------------------------------


def test_scores_are_weighted_shares_of_their_totals():
    first, second = importances(2)
    found, alone = add_scores([first, second], [0.3, 2.0]), add_scores([first], [2.0])
    for i in range(3):
        for j in range(4):
            a, b = first[i, j].item() / first.sum().item(), second[i, j].item() / second.sum().item()
            assert found[i, j].item() == pytest.approx(0.3 * a + 2 * b, rel=1e-14)
            assert alone[i, j].item() == pytest.approx(2 * a, rel=1e-14)


def test_scores_as_they_are():
    first, second = importances(2)
    found = add_scores([first, second], [0.5, 2.0], normalize=False)
    assert torch.allclose(found, 0.5 * first + 2 * second, rtol=1e-15)
    assert torch.equal(first, importances(1)[0])  # what was given is as it was


def test_factors_are_weighted_shares_of_their_traces():
    first, second = (torch.rand(4, 4, generator=generator(s)) for s in (1, 2))
    found = add_factors([first, second], [0.3, 2.0])
    assert found.dtype == torch.float64
    traces = [sum(m[i, i].item() for i in range(4)) for m in (first, second)]
    for i in range(4):
        for j in range(4):
            expected = 0.3 * first[i, j].item() / traces[0] + 2 * second[i, j].item() / traces[1]
            assert found[i, j].item() == pytest.approx(expected, rel=1e-14)


def test_traces_are_summed_in_float64():
    factor = torch.diag(torch.tensor([2.0**24, 1.0, 1.0]))
    assert add_factors([factor], [1.0])[1, 1].item() == pytest.approx(1 / (2**24 + 2), rel=1e-15)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_nothing_to_divide_by(wrong):
    good, bad = torch.ones(2, 2), torch.full((2, 2), wrong)
    with pytest.raises(InputError, match="curvature, or the general one, is zero"):
        add_scores([good, bad], [1.0, 1.0])
    with pytest.raises(InputError, match="curvature, or the general one, is zero"):
        add_scores([good, bad], [1.0, 1.0], normalize=False)
    with pytest.raises(InputError, match="factor, or the general one, is zero"):
        add_factors([good, bad], [1.0, 1.0])
    small = torch.full((2, 2), 1e-30)
    assert torch.equal(add_scores([small], [1.0]), torch.full((2, 2), 0.25))
    assert add_factors([small], [1.0]).tolist() == [[0.5, 0.5]] * 2


def test_every_score_needs_its_weight():
    for add in (add_scores, add_factors):
        with pytest.raises(ValueError, match="zip"):
            add([torch.ones(2, 2)] * 2, [1.0])


def test_the_default_device_plays_no_part():
    scores = importances(2)
    with torch.device("meta"):
        assert not add_scores(scores, [1.0, 1.0]).is_meta
        assert not add_factors([torch.eye(2, device="cpu")], [1.0]).is_meta
        assert not mass_before(scores[0]).is_meta
        assert not union_of_count(scores, 0.5, 3).is_meta


# -- shares before a component -----------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_mass_before_is_what_a_sort_takes_first(ties):
    importance = importances(1, ties=ties)[0]
    values = importance.flatten().tolist()
    order = sorted(range(12), key=lambda place: -values[place])
    found = mass_before(importance)
    assert found.shape == (3, 4)
    for rank, place in enumerate(order):
        before = math.fsum(values[p] for p in order[:rank]) / math.fsum(values)
        assert found.flatten()[place].item() == pytest.approx(before, rel=1e-14, abs=0)


def test_ties_come_in_order_of_rows_then_columns():
    """So many that a sort which keeps no order shows."""
    expected = torch.arange(600, dtype=torch.float64).view(20, 30) / 600
    assert torch.allclose(mass_before(torch.ones(20, 30).double()), expected, rtol=0, atol=1e-15)


def test_mass_before_of_one():
    assert mass_before(torch.tensor([[3.0]])).tolist() == [[0.0]]


# -- unions ------------------------------------------------------------------------------------------------


def union_at(scores, rho):
    return torch.stack([mass_before(score) < rho for score in scores]).any(0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("count", range(14))
def test_union_is_the_largest_that_fits(count, rho, ties):
    """Tried at every share at which it changes: all of them at most rho."""
    scores = importances(2, ties=ties)
    shares = sorted({share for score in scores for share in mass_before(score).flatten().tolist() if share < rho})
    unions = [union_at(scores, share) for share in [*shares, rho]]
    expected = max((union for union in unions if int(union.sum()) <= count), key=lambda union: int(union.sum()))
    found = union_of_count(scores, rho, count)
    assert found.dtype == torch.bool and torch.equal(found, expected)


def test_a_union_of_one_is_its_selection():
    score = importances(1)[0]
    for rho in (0.2, 0.5, 0.9):
        keep = select_components(score, rho)
        assert torch.equal(union_of_count([score], rho, 12), keep)
        assert torch.equal(union_of_count([score], 1.0, int(keep.sum())), keep)


def test_a_union_never_exceeds_rho():
    importances = [torch.rand(6, 5, generator=generator(s), dtype=torch.float64) for s in (1, 2)]
    keep = union_of_count(importances, 0.3, 30)
    assert torch.equal(keep, select_components(importances[0], 0.3) | select_components(importances[1], 0.3))
