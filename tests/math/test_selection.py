"""Selection against a full sort with exact sums."""

import math

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.math import selection
from lightning_kfac.math.importance import modified, original
from lightning_kfac.math.selection import check_rho, select_components, select_count, select_products
from tests.common import generator
from tests.oracle import full_sort_selection

RHOS = [0.0, 1e-9, 0.1, 0.6, 0.75, 0.999, 1.0]
SPECTRA = {
    "random": (
        torch.rand(7, generator=generator(1)).sort(descending=True).values,
        torch.rand(9, generator=generator(2)).sort(descending=True).values,
    ),
    "power law": (torch.arange(1, 12).double() ** -1.5, torch.arange(1, 8).double() ** -0.7),
    "ties": (torch.tensor([4.0, 2, 2, 1, 1, 1]), torch.tensor([8.0, 4, 4, 2, 1])),
    "all equal": (torch.ones(5), torch.ones(4)),
    "zeros": (torch.tensor([3.0, 1, 0, 0]), torch.tensor([2.0, 2, 0])),
    "one": (torch.tensor([2.0]), torch.tensor([5.0])),
    "tiny and huge": (torch.tensor([1e30, 1.0, 1e-30]).double(), torch.tensor([1e20, 1e-40]).double()),
}


def kept_cells(keep):
    return sorted((i, j) for i, j in keep.nonzero().tolist())


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("case", SPECTRA)
def test_select_products_equals_a_full_sort(case, rho):
    rows, columns = SPECTRA[case]
    counts = select_products(rows, columns, rho)
    importance = original(rows.double(), columns.double())
    expected = full_sort_selection(importance, rho)
    assert sorted((i, j) for i, n in enumerate(counts.tolist()) for j in range(n)) == expected
    assert kept_cells(select_components(importance, rho)) == expected


@pytest.mark.parametrize("rho", RHOS)
def test_select_components_equals_a_full_sort(rho):
    lambda_G, mu_A = SPECTRA["random"]
    c = torch.randn(7, 9, generator=generator(3))
    importance = modified(original(lambda_G, mu_A), c)
    importance[2, 3] = importance[5, 1] = importance[0, 0]
    importance[6] = 0
    assert kept_cells(select_components(importance, rho)) == full_sort_selection(importance, rho)


@pytest.mark.parametrize("seed", range(20))
def test_select_products_on_random_integers_with_many_ties(seed):
    rows = torch.randint(0, 5, (8,), generator=generator(seed)).sort(descending=True).values + torch.zeros(8)
    columns = torch.randint(0, 4, (6,), generator=generator(seed + 99)).sort(descending=True).values + torch.zeros(6)
    rows[0] = columns[0] = 5
    rho = torch.rand((), generator=generator(seed)).item()
    counts = select_products(rows, columns, rho)
    cells = sorted((i, j) for i, n in enumerate(counts.tolist()) for j in range(n))
    assert cells == full_sort_selection(original(rows, columns), rho)


def test_selection_agrees_at_a_realistic_size():
    lambda_G = torch.arange(1, 801, dtype=torch.float64) ** -1.2
    mu_A = torch.arange(1, 501, dtype=torch.float64) ** -1.6
    for rho in (0.3, 0.6, 0.9):
        counts = select_products(lambda_G, mu_A, rho)
        keep = torch.arange(500) < counts[:, None]
        assert torch.equal(keep, select_components(original(lambda_G, mu_A), rho))


def staircase(counts):
    return [(i, j) for i, n in enumerate(counts.tolist()) for j in range(n)]


@pytest.mark.parametrize("few", [0, 1, 5])
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("case", SPECTRA)
def test_bisection_equals_a_full_sort(case, rho, few, monkeypatch):
    """Small spectra are sorted at once, so that only a smaller limit makes them be told apart by steps."""
    monkeypatch.setattr(selection, "FEW", few)
    rows, columns = SPECTRA[case]
    expected = full_sort_selection(original(rows.double(), columns.double()), rho)
    assert staircase(select_products(rows, columns, rho)) == expected


@pytest.mark.parametrize("few", [0, 3])
@pytest.mark.parametrize("seed", range(20))
def test_bisection_on_random_integers_with_many_ties(seed, few, monkeypatch):
    monkeypatch.setattr(selection, "FEW", few)
    rows, columns = (
        torch.randint(0, 5, (n,), generator=generator(seed + n)).sort(descending=True).values.double() for n in (8, 6)
    )
    rows[0] = columns[0] = 5
    for rho in torch.rand(4, generator=generator(seed), dtype=torch.float64).tolist():
        assert staircase(select_products(rows, columns, rho)) == full_sort_selection(original(rows, columns), rho)


def test_neighbouring_numbers_are_told_apart(monkeypatch):
    """S is 1, and 1 less one or two units of rounding: the second largest stands below the third, not beside it."""
    monkeypatch.setattr(selection, "FEW", 0)
    rows = torch.tensor([1, 1 - 2**-53], dtype=torch.float64)
    columns = torch.tensor([1, 1 - 2**-52], dtype=torch.float64)
    for rho, counts in [(0.25, [1, 0]), (0.5, [1, 1]), (0.75, [2, 1])]:
        assert select_products(rows, columns, rho).tolist() == counts


@pytest.mark.parametrize("few", [0, 1, 6, 7, 4096])
@pytest.mark.parametrize("case", SPECTRA)
def test_no_more_than_a_few_components_are_sorted(case, few, monkeypatch):
    """Ties are counted; what is left is sorted as soon as it is few enough, without a further step."""
    steps, counts_at_least, first_of_few = [], selection._counts_at_least, selection._first_of_few

    def watched(rows, columns, above, reached, missing):
        assert 0 < int((reached - above).sum()) <= few
        return first_of_few(rows, columns, above, reached, missing)

    monkeypatch.setattr(selection, "FEW", few)
    monkeypatch.setattr(selection, "_first_of_few", watched)
    monkeypatch.setattr(selection, "_counts_at_least", lambda *given: steps.append(1) or counts_at_least(*given))
    rows, columns = SPECTRA[case]
    for rho in RHOS[1:-1]:
        steps.clear()
        select_products(rows, columns, rho)
        if len(rows) * len(columns) <= few:
            assert len(steps) == 1


def test_exactly_a_few_are_sorted_at_once(monkeypatch):
    """Of 2 x 3 components all lie above the lower bound."""
    monkeypatch.setattr(selection, "FEW", 6)
    calls, counts_at_least = [], selection._counts_at_least
    monkeypatch.setattr(selection, "_counts_at_least", lambda *given: calls.append(1) or counts_at_least(*given))
    rows, columns = torch.tensor([3.0, 2.0]), torch.tensor([4.0, 3.5, 3.0])
    assert select_products(rows, columns, 0.5).tolist() == [3, 0]
    assert len(calls) == 1


@pytest.mark.parametrize("few", [0, 4096])
def test_a_sum_that_meets_its_target_to_the_bit_is_enough(few, monkeypatch):
    monkeypatch.setattr(selection, "FEW", few)
    large = 0.75 * 4.0 * (1 - 1e-12)
    values = torch.tensor([large, 4 - large], dtype=torch.float64)
    assert values.sum() == 4
    assert select_components(values[None], 0.75).tolist() == [[True, False]]
    assert select_products(values, torch.ones(1), 0.75).tolist() == [1, 0]
    assert select_products(torch.ones(1), values, 0.75).tolist() == [1]
    # One bit more, and the second is needed.
    above = torch.tensor([math.nextafter(large, 0), 4 - math.nextafter(large, 0)], dtype=torch.float64)
    assert select_components(above[None], 0.75).all()
    assert select_products(above, torch.ones(1), 0.75).tolist() == [1, 1]
    # The same where both share a bucket of neighbouring numbers.
    total = 5.505
    large = 0.5001 * total * (1 - 1e-12)
    values = torch.tensor([large, total - large], dtype=torch.float64)
    assert selection._buckets(values).unique().numel() == 1 and values.sum() == total
    assert select_components(values[None], 0.5001).tolist() == [[True, False]]


def test_the_smallest_numbers_there_are():
    values = torch.full((1, 4), 5e-324, dtype=torch.float64)
    assert select_components(values, 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("count", [3, 7, 10])
def test_rounding_does_not_cost_a_component(count):
    """0.1 ten times sums to less than 1, and 0.3 of that lies a bit beside 0.1 three times."""
    values = torch.full((2, 5), 0.1, dtype=torch.float64)
    assert int(select_components(values, count / 10).sum()) == count
    counts = select_products(torch.full((2,), 0.1).double(), torch.ones(5).double(), count / 10)
    assert counts.sum() == count


def test_ties_are_kept_in_order_of_rows_then_columns():
    keep = select_components(torch.ones(3, 4), 0.5)
    assert keep.flatten().tolist() == [True] * 6 + [False] * 6
    assert select_products(torch.ones(3), torch.ones(4), 0.5).tolist() == [4, 2, 0]
    # So many that a sort which keeps no order shows.
    assert torch.equal(select_components(torch.ones(20, 30), 0.5).flatten(), torch.arange(600) < 300)
    assert select_products(torch.ones(20), torch.ones(30), 0.5).tolist() == [30] * 10 + [0] * 10
    assert torch.equal(select_count(torch.ones(20, 30), 300).flatten(), torch.arange(600) < 300)


@pytest.mark.parametrize("rho", [0, 0.0, 1, 1.0])
def test_none_and_all(rho):
    importance = torch.tensor([[0.0, -1.0], [float("nan"), 2.0]])  # not even looked at
    keep = select_components(importance, rho)
    assert keep.dtype == torch.bool and keep.tolist() == [[bool(rho)] * 2] * 2
    counts = select_products(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, 0.0]), rho)
    assert counts.dtype == torch.int64 and counts.tolist() == [2 * int(rho)] * 3
    on_meta = torch.ones(2, device="meta")
    assert select_components(on_meta[None], rho).is_meta and select_products(on_meta, on_meta, rho).is_meta


def test_one_component():
    for rho in (1e-9, 0.5, 0.999999):
        assert select_components(torch.tensor([[0.25]]), rho).tolist() == [[True]]
        assert select_products(torch.tensor([0.5]), torch.tensor([0.5]), rho).tolist() == [1]


def test_float32_importance_is_summed_in_float64():
    """2^24 + 1 is no float32 number: summed in float32 the many small ones would add nothing."""
    importance = torch.ones(1, 4097)
    importance[0, 0] = 2.0**24
    rho = (2.0**24 + 100) / (2.0**24 + 4096)
    assert int(select_components(importance, rho).sum()) == 101
    assert select_products(torch.ones(1), importance[0], rho).tolist() == [101]


def test_results_lie_where_the_importance_lies():
    importance = torch.rand(5, 6, generator=generator())
    expected = select_components(importance, 0.7), select_count(importance, 11)
    rows, columns = SPECTRA["ties"]
    counts = selection._counts_at_least(rows, columns, 4.0)
    above = selection._counts_at_least(rows, columns, 8.0)
    few = selection._first_of_few(rows, columns, above, counts, 9.0)
    with torch.device("meta"):  # a default device that would be the wrong one
        assert torch.equal(select_components(importance, 0.7), expected[0])
        assert torch.equal(select_count(importance, 11), expected[1])
        assert not select_count(importance, 0).is_meta and not select_count(importance, 30).is_meta
        assert not select_components(importance, 1).is_meta and not select_products(rows, columns, 1).is_meta
        assert torch.equal(selection._counts_at_least(rows, columns, 4.0), counts)
        assert torch.equal(selection._first_of_few(rows, columns, above, counts, 9.0), few)


# -- a number of components --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_select_count_equals_a_full_sort(ties, dtype):
    importance = torch.randn(4, 5, generator=generator(), dtype=torch.float64).to(dtype)
    if ties:
        importance = torch.randint(-1, 2, (4, 5), generator=generator()).to(dtype)
    order = sorted(range(20), key=lambda place: -importance.flatten()[place].item())
    for count in range(-1, 23):
        keep = select_count(importance, count)
        assert keep.shape == (4, 5) and keep.dtype == torch.bool
        assert keep.flatten().nonzero().flatten().tolist() == sorted(order[: max(count, 0)])


def test_select_count_of_nothing_and_of_one():
    assert select_count(torch.empty(0, 3), 2).shape == (0, 3)
    assert select_count(torch.tensor([[-1.0]]), 1).tolist() == [[True]]
    assert select_count(torch.tensor([[-1.0]]), 0).tolist() == [[False]]


# -- its parts ---------------------------------------------------------------------------------------------


def counts_at_least(rows, columns, threshold):
    return [sum(row * column >= threshold for column in columns.tolist()) for row in rows.tolist()]


def thresholds(rows, columns):
    """Every product, and the numbers beside it."""
    products = sorted({row * column for row in rows.tolist() for column in columns.tolist()})
    return [n for p in products for n in (math.nextafter(p, 0), p, math.nextafter(p, math.inf))]


@pytest.mark.parametrize("case", SPECTRA)
def test_counts_of_a_threshold(case):
    rows, columns = (side.double() for side in SPECTRA[case])
    for threshold in [0.0, *thresholds(rows, columns)]:
        expected = counts_at_least(rows, columns, threshold)
        found = selection._counts_at_least(rows, columns, threshold)
        assert found.dtype == torch.int64 and found.tolist() == expected
        assert selection._counts_by_bisection(rows, columns, threshold).tolist() == expected
        some = [i for i, n in enumerate(expected) if n]  # the rows that quotients can be taken of
        if threshold and some:
            found = selection._prefixes(rows[some], columns, threshold)
            assert found.tolist() == [expected[i] for i in some]


@pytest.mark.parametrize("n_columns", range(1, 18))
def test_bisection_of_every_width(n_columns):
    """A row for each count from none to all."""
    columns = torch.arange(n_columns, 0, -1, dtype=torch.float64)
    rows = torch.tensor([1e9, *(1 / (n_columns - n + 0.5) for n in range(n_columns, -1, -1))], dtype=torch.float64)
    assert selection._counts_by_bisection(rows, columns, 1.0).tolist() == counts_at_least(rows, columns, 1.0)
    assert set(counts_at_least(rows, columns, 1.0)) == set(range(n_columns + 1))


def test_products_that_underflow_are_counted_by_bisection(monkeypatch):
    """Products below 2^-1022 lose digits, so that quotients are off by any number of steps."""
    rows = torch.tensor([2.0**-500, 2.0**-510], dtype=torch.float64)
    columns = 2.0**-570 * (1 + torch.arange(64, 0, -1, dtype=torch.float64) / 128)
    asked = []
    bisection = selection._counts_by_bisection
    monkeypatch.setattr(selection, "_counts_by_bisection", lambda *given: asked.append(1) or bisection(*given))
    for threshold in thresholds(rows, columns):
        if threshold:
            expected = counts_at_least(rows, columns, threshold)
            assert selection._counts_at_least(rows, columns, threshold).tolist() == expected
    assert asked


def test_quotients_place_ordinary_products_without_bisection(monkeypatch):
    """Powers of two divide exactly: the first place is the right one, ties and all."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(selection, "_counts_by_bisection", fail)
    columns = torch.tensor([4.0] * 9 + [2.0] * 9 + [1.0] * 9, dtype=torch.float64)
    rows = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    for limit in (1, 4):
        monkeypatch.setattr(selection, "FIX_UPS", limit)
        for threshold in (0.5, 1.0, 2.0, 3.0, 4.0):
            assert selection._prefixes(rows, columns, threshold).tolist() == counts_at_least(rows, columns, threshold)
    # Rounding puts others off by a step, which one look back or ahead mends.
    monkeypatch.setattr(selection, "FIX_UPS", 4)
    rows, columns = (torch.rand(40, generator=generator(s)).double().sort(descending=True).values + 1 for s in (1, 2))
    for threshold in thresholds(rows[:5], columns):
        some = rows * columns[0] >= threshold
        if some.any():
            found = selection._prefixes(rows[some], columns, threshold)
            assert found.tolist() == counts_at_least(rows[some], columns, threshold)


def test_first_ties():
    ties = torch.tensor([2, 0, 3])
    for wanted, expected in [
        (0.0, [1, 0, 0]),
        (0.5, [1, 0, 0]),
        (1.0, [1, 0, 0]),
        (1.5, [2, 0, 0]),
        (3.0, [2, 0, 1]),
        (3 * (1 + 1e-13), [2, 0, 1]),  # rounding
        (3 * (1 + 1e-11), [2, 0, 2]),
        (5.0, [2, 0, 3]),
        (9.0, [2, 0, 3]),
    ]:
        assert selection._first_ties(ties, wanted).tolist() == expected


def test_first_of_few():
    """Rows 3 and 2, columns 4, 2, 1; above keeps 12, reached all but 2 * 1: 8, 6, 4, 3 lie between."""
    rows, columns = torch.tensor([3.0, 2.0]), torch.tensor([4.0, 2.0, 1.0])
    above, reached = torch.tensor([1, 0]), torch.tensor([3, 2])
    for missing, expected in [(7, [0, 1]), (8, [0, 1]), (8.5, [1, 1]), (14, [1, 1]), (15, [1, 2]), (20, [2, 2])]:
        assert selection._first_of_few(rows, columns, above, reached, missing).tolist() == expected


def test_bits_of_numbers():
    for number in (0.0, 5e-324, 1.0, 1e300):
        assert selection._from_bits(selection._bits(number)) == number
        assert selection._from_bits(selection._bits(number) + 1) == math.nextafter(number, math.inf)
    values = torch.tensor([0.0, 1.0, 1.0 + 2**-9, 1.0 + 2**-8, 2.0], dtype=torch.float64)
    assert selection._buckets(values).tolist() == [0, 0x3FF00, 0x3FF00, 0x3FF01, 0x40000]


# -- what is refused ---------------------------------------------------------------------------------------


def test_check_rho_gives_a_float():
    for rho in (0, 1, 0.25):
        assert check_rho(rho) == rho and isinstance(check_rho(rho), float)


@pytest.mark.parametrize("wrong", [-1e-300, float("nan"), float("inf"), float("-inf")])
def test_entries_that_are_no_importance(wrong):
    message = "negative, NaN or infinite"
    with pytest.raises(InputError, match=message):
        select_components(torch.tensor([[1.0, wrong]], dtype=torch.float64), 0.5)
    good, bad = torch.ones(1), torch.tensor([1.0, wrong], dtype=torch.float64)
    for rows, columns in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=message):
            select_products(rows, columns, 0.5)


def test_spectra_must_descend_on_both_sides():
    rising, flat = torch.tensor([1.0, 2.0]), torch.ones(2)
    for rows, columns in ((flat, rising), (rising, flat)):
        with pytest.raises(InputError, match="descending"):
            select_products(rows, columns, 0.5)
    assert select_products(flat, flat, 0.5).tolist() == [2, 0]


@pytest.mark.parametrize("rho", [-0.1, 1.1, float("nan"), float("inf"), "0.5"])
def test_wrong_rho(rho):
    with pytest.raises(InputError, match="rho is"):
        select_products(torch.ones(2), torch.ones(2), rho)
    with pytest.raises(InputError, match="rho is"):
        select_components(torch.ones(2, 2), rho)


def test_wrong_importance():
    with pytest.raises(InputError, match="zero everywhere"):
        select_components(torch.zeros(2, 2), 0.5)
    with pytest.raises(InputError, match="zero everywhere"):
        select_products(torch.zeros(2), torch.ones(2), 0.5)
    with pytest.raises(InputError, match="negative"):
        select_components(torch.tensor([[1.0, -1.0]]), 0.5)
    with pytest.raises(InputError, match="descending"):
        select_products(torch.tensor([1.0, 2.0]), torch.ones(2), 0.5)


@pytest.mark.parametrize("few", [0, 3, 4096])
@pytest.mark.parametrize("seed", range(10))
def test_products_are_selected_exactly_wherever_the_search_ends(monkeypatch, few, seed):
    monkeypatch.setattr(selection, "FEW", few)
    rows = torch.randint(0, 5, (9,), generator=generator(seed)).double().sort(descending=True).values + 1e-9
    columns = torch.rand(7, generator=generator(seed + 50), dtype=torch.float64).sort(descending=True).values
    columns[2] = columns[3]
    for rho in (0.1, 0.5, 0.9, 0.999):
        counts = select_products(rows, columns, rho)
        cells = [(i, j) for i, n in enumerate(counts.tolist()) for j in range(n)]
        assert cells == full_sort_selection(original(rows, columns), rho)


@pytest.mark.parametrize("scale", [1e-310, 1e-160, 1e150])
def test_products_that_underflow_or_are_huge(scale):
    rows = torch.tensor([7.0, 3.0, 2.0, 0.0], dtype=torch.float64) * scale
    columns = torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64) * min(1 / scale, 1e300)
    counts = select_products(rows, columns, 0.9)
    cells = [(i, j) for i, n in enumerate(counts.tolist()) for j in range(n)]
    assert cells == full_sort_selection(original(rows, columns), 0.9)


@pytest.mark.parametrize("rho", [0.01, 0.3, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("seed", range(5))
def test_components_are_selected_as_by_a_stable_sort(rho, seed):
    """Twelve powers of ten, many equal entries, zeros."""
    values = 10.0 ** torch.randint(-6, 6, (40, 30), generator=generator(seed)).double()
    values *= torch.randint(0, 4, (40, 30), generator=generator(seed + 1))
    flat = values.flatten()
    descending, order = flat.sort(descending=True, stable=True)
    n = int((descending.cumsum(0) < rho * flat.sum() * (1 - 1e-12)).sum()) + 1
    expected = torch.zeros_like(flat, dtype=torch.bool)
    expected[order[:n]] = True
    assert torch.equal(select_components(values, rho), expected.view(40, 30))
    assert torch.equal(select_count(values, n), expected.view(40, 30))


def test_the_ends_of_a_count():
    values = torch.ones(3, 2)
    assert not select_count(values, 0).any() and select_count(values, 6).all()
    assert select_count(values, 3).tolist() == [[True, True], [True, False], [False, False]]
