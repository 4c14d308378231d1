"""Sums of outer products against float64 sums.

Whole numbers and their products are exact in float32 up to 2^24: where a test adds these up, every bit must be right.
"""

import pytest
import torch

from lightning_kfac.math.covariance import (
    SecondMoment,
    accumulate_upper,
    accumulator_numbers,
    mirror,
    pack_upper,
    panel_edges,
    unpack_upper,
)
from tests.common import generator

# One panel, two, four, eight; at each edge the sizes on both sides.
EDGES = [1, 2, 3, 255, 256, 257, 511, 512, 513, 2751, 2752, 2753]


def whole_numbers(n, size, seed=0):
    return torch.randint(-8, 9, (n, size), generator=generator(seed)).float()


def exact_sum(batches):
    return sum(x.double().T @ x.double() for x in batches)


# -- SecondMoment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 131])
def test_second_moment_is_x_transposed_x(size):
    moment = SecondMoment(size)
    batches = [torch.randn(n, size, generator=generator(n)) for n in (1, 7, 30)]
    for x in batches:
        moment.add(x)
    exact = exact_sum(batches)
    assert torch.equal(moment.sum(), moment.sum().T)
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6
    assert moment.trace().item() == pytest.approx(exact.trace().item(), rel=1e-5)


@pytest.mark.parametrize("size", EDGES)
def test_second_moment_of_whole_numbers_is_exact_at_the_edges_of_panels(size):
    moment, batches = SecondMoment(size), [whole_numbers(n, size, n) for n in (1, 4)]
    for x in batches:
        moment.add(x)
    exact = exact_sum(batches)
    found = moment.sum()
    assert found.dtype == torch.float32
    assert torch.equal(found, exact.float())
    assert moment.trace().item() == exact.trace().item()


@pytest.mark.parametrize("size", [3, 300])
def test_sum_and_trace_hold_both_accumulators(size):
    moment, x = SecondMoment(size), whole_numbers(2, size)
    for batches in range(1, 131):
        moment.add(x)
        if batches in (63, 64, 65, 127, 128, 130):
            exact = batches * exact_sum([x])
            assert moment.trace().item() == exact.trace().item()
            if batches in (63, 65, 130):  # sum() moves what is recent; the batches after it must not suffer
                assert torch.equal(moment.sum(), exact.float())
                assert moment.trace().item() == exact.trace().item()


def test_second_moment_stays_exact_over_4096_batches():
    moment, exact = SecondMoment(6), torch.zeros(6, 6, dtype=torch.float64)
    for i in range(4096):
        x = torch.rand(8, 6, generator=generator(i)) + 0.5  # all positive: the sum only grows
        moment.add(x)
        exact += x.double().T @ x.double()
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6


def test_the_second_accumulator_keeps_what_one_alone_would_lose():
    """A sum near 4096 has 2^-12 between float32 neighbours, so one accumulator drops the 2^-16 of each batch: always
    in the same direction. 64 batches and 64 such sums each need 23 bits at most and are exact.
    """
    x = torch.tensor([[1.0, 1.0], [1 / 256, 2 / 256]])
    moment, alone = SecondMoment(2), torch.zeros(2, 2)
    for _ in range(4096):
        moment.add(x)
        alone += x.T @ x
    exact = 4096 * exact_sum([x])
    assert (alone.double() - exact).norm() / exact.norm() > 2e-5
    assert torch.equal(moment.sum().double(), exact)


def test_the_recent_sum_settles_at_every_64th_batch():
    moment, x = SecondMoment(2), torch.ones(1, 2)
    for batches in range(1, 200):
        moment.add(x)
        state = moment.state()
        assert state["batches"] == batches
        assert ("settled0" in state) == (batches >= 64)
        if batches < 64:
            moment.sum()  # needs no second accumulator yet, and makes none
            assert "settled0" not in moment.state()
        assert state["recent0"][0, 0] == batches % 64


def test_second_moment_of_bfloat16_has_no_further_rounding():
    x = torch.randn(40, 9, generator=generator()).bfloat16()
    moment = SecondMoment(9)
    moment.add(x)
    exact = x.double().T @ x.double()
    assert (moment.sum().double() - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_second_moment_takes_every_dtype(dtype):
    moment, x = SecondMoment(5), whole_numbers(7, 5)
    moment.add(x.to(dtype))
    assert torch.equal(moment.sum(), exact_sum([x]).float())


def test_second_moment_of_nothing_is_zero():
    moment = SecondMoment(300)
    moment.add(torch.empty(0, 300))
    assert torch.equal(moment.sum(), torch.zeros(300, 300))
    assert moment.trace().item() == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_trace_shows_what_is_not_finite(wrong, settled, place):
    moment, x = SecondMoment(300), torch.ones(2, 300)
    x[1, place] = wrong
    moment.add(x)
    for _ in range(64 * settled):
        moment.add(torch.ones(1, 300))
    assert not moment.trace().isfinite()


@pytest.mark.parametrize("size", [3, 300])
def test_panels_added_apart_are_the_sum(size):
    moment, whole = SecondMoment(size), SecondMoment(size)
    for i in range(70):
        x = whole_numbers(3, size, i)
        whole.add(x)
        panels = [torch.zeros(last, last - first) for first, last in panel_edges(size)]
        accumulate_upper(panels, panel_edges(size), x)
        for number, panel in enumerate(panels):
            moment.add_panel(number, panel)
        moment.count_batch()
    assert torch.equal(moment.sum(), whole.sum())
    assert moment.state()["batches"] == 70


@pytest.mark.parametrize("batches", [1, 64, 70])
@pytest.mark.parametrize("size", [3, 300])
def test_packed_sums_travel(size, batches):
    moment, other = SecondMoment(size), SecondMoment(size)
    x = whole_numbers(3, size)
    for _ in range(batches):
        moment.add(x)
        other.add(whole_numbers(3, size, 1))  # replaced by what arrives
    packed = moment.packed()
    exact = exact_sum([x] * batches).float()
    assert torch.equal(packed, exact[torch.ones(size, size).triu().bool()])
    other.load_packed(packed)
    assert torch.equal(other.sum(), exact)
    other.add(x)
    assert torch.equal(other.sum(), exact + exact_sum([x]).float())
    assert torch.equal(moment.packed(), packed)


@pytest.mark.parametrize("before", [0, 63, 64, 70])
@pytest.mark.parametrize("size", [2, 300])
def test_a_loaded_state_goes_on_bit_for_bit(size, before):
    batches = [torch.randn(2, size, generator=generator(i)) for i in range(before + 3)]
    whole, resumed = SecondMoment(size), SecondMoment(size)
    for _ in range(66):
        resumed.add(torch.ones(1, size))  # a sum of its own that the state replaces
    for x in batches[:before]:
        whole.add(x)
    state = {name: value.clone() for name, value in whole.state().items()}
    resumed.load_state(state)
    assert all(torch.equal(resumed.state()[name], value) for name, value in state.items())
    assert torch.equal(resumed.sum(), whole.sum())
    assert set(resumed.state()) == set(whole.state())
    for x in batches[before:]:
        whole.add(x)
        resumed.add(x)
        for name, value in whole.state().items():
            assert torch.equal(resumed.state()[name], value)
        assert set(whole.state()) == set(resumed.state())
    assert torch.equal(resumed.sum(), whole.sum())
    again = SecondMoment(size)
    again.load_state(state)  # it is a copy that went on: the state is as it was
    assert again.trace().item() == pytest.approx(
        sum(x.double().square().sum().item() for x in batches[:before]), rel=1e-6
    )


def test_tensors_of_a_moment_live_where_it_is_told():
    """On the meta device, whose tensors hold no numbers, whatever the default device is."""
    moment = SecondMoment(300, device="meta")
    moment.count_batch()
    assert all(panel.is_meta for name, panel in moment.state().items() if name != "batches")
    moment._settle()
    assert all(panel.is_meta for name, panel in moment.state().items() if name != "batches")
    assert moment.sum().is_meta
    x = whole_numbers(3, 300)
    source = SecondMoment(300)
    for _ in range(65):
        source.add(x)
    moment.load_state(source.state())
    assert moment.state()["settled0"].is_meta
    with torch.device("meta"):  # a default device that would be the wrong one
        on_cpu = SecondMoment(300)
        on_cpu.add(x)
        assert torch.equal(on_cpu.sum(), exact_sum([x]).float())
        assert torch.equal(unpack_upper(pack_upper(on_cpu.sum()), 300), on_cpu.sum())


def test_sums_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        moment = SecondMoment(3)
        moment.add(torch.ones(2, 3))
        assert moment.sum().dtype == torch.float32
        assert moment.state()["recent0"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# -- panels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", EDGES)
def test_panels_cover_the_columns_evenly(size):
    edges = panel_edges(size)
    assert [column for first, last in edges for column in range(first, last)] == list(range(size))
    widths = [last - first for first, last in edges]
    assert max(widths) - min(widths) <= 1
    assert len(edges) == (1 if size < 256 else 2 if size < 512 else 4 if size < 2752 else 8)


@pytest.mark.parametrize("size", [1, 255, 256, 600])
def test_accumulator_numbers_are_counted(size):
    moment = SecondMoment(size)
    for _ in range(64):
        moment.add(torch.ones(1, size))
    state = moment.state()
    assert accumulator_numbers(size) == sum(panel.numel() for name, panel in state.items() if name != "batches")


def test_accumulate_upper_adds_to_what_is_there():
    x, edges = whole_numbers(6, 7), [(0, 3), (3, 5), (5, 7)]
    panels = [torch.full((last, last - first), 100.0) for first, last in edges]
    accumulate_upper(panels, edges, x)
    exact = exact_sum([x])
    for (first, last), panel in zip(edges, panels, strict=True):
        assert torch.equal(panel.double(), exact[:last, first:last] + 100)


def test_panels_and_edges_must_match():
    for x in (torch.ones(2, 4), torch.ones(2, 4).bfloat16()):
        with pytest.raises(ValueError, match="zip"):
            accumulate_upper([torch.zeros(2, 2)], [(0, 2), (2, 4)], x)


class Witness:
    """A panel that notes how float32 matrices are multiplied at the time."""

    def __init__(self, fails):
        self.fails = fails

    def addmm_(self, left, right):
        self.precision = torch.backends.mkldnn.matmul.fp32_precision
        self.dtype = left.dtype
        if self.fails:
            raise RuntimeError


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float32, "ieee"), (torch.float16, "ieee")]
)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_only_bfloat16_may_use_bfloat16_units_and_the_setting_is_put_back(dtype, precision, fails, before):
    setting, witness = torch.backends.mkldnn.matmul, Witness(fails)
    kept = setting.fp32_precision
    try:
        setting.fp32_precision = before
        try:
            accumulate_upper([witness], [(0, 2)], torch.ones(1, 2, dtype=dtype))
        except RuntimeError:
            assert fails
        assert setting.fp32_precision == before
    finally:
        setting.fp32_precision = kept
    assert witness.precision == precision
    assert witness.dtype == torch.float32


class OnCuda(torch.Tensor):
    """Says that it lies on a CUDA device."""

    is_cuda = True


def test_bfloat16_on_cuda_is_multiplied_with_a_float32_result(monkeypatch):
    """torch.addmm of CUDA's signature stands in for it: what is multiplied, and that it is added in place."""

    def addmm(panel, left, right, *, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32
        assert out is panel
        panel += left.as_subclass(torch.Tensor).to(out_dtype) @ right.as_subclass(torch.Tensor).to(out_dtype)

    monkeypatch.setattr(torch, "addmm", addmm)
    x, edges = whole_numbers(6, 5), [(0, 2), (2, 5)]
    panels = [torch.full((last, last - first), 100.0) for first, last in edges]
    accumulate_upper(panels, edges, x.bfloat16().as_subclass(OnCuda))
    for (first, last), panel in zip(edges, panels, strict=True):
        assert torch.equal(panel.double(), exact_sum([x])[:last, first:last] + 100)
    with pytest.raises(ValueError, match="zip"):
        accumulate_upper([torch.zeros(2, 2)], edges, x.bfloat16().as_subclass(OnCuda))
    # Any other dtype goes the common way, on a CUDA device too.
    accumulate_upper(panels, edges, x.as_subclass(OnCuda))
    assert torch.equal(panels[0].double(), 2 * exact_sum([x])[:2, :2] + 100)


# -- triangles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7])
def test_mirror_ignores_the_lower_triangle(size):
    matrix = torch.randn(size, size, generator=generator())
    expected = [[matrix[min(i, j), max(i, j)].item() for j in range(size)] for i in range(size)]
    assert mirror(matrix).tolist() == expected


def test_packing_keeps_every_bit():
    matrix = mirror(torch.randn(11, 11, generator=generator()))
    assert pack_upper(matrix).shape == (66,)
    assert torch.equal(unpack_upper(pack_upper(matrix), 11), matrix)


def test_packing_goes_row_after_row():
    matrix = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 4.0, 5.0], [-1.0, -1.0, 6.0]], dtype=torch.float64)
    assert pack_upper(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    unpacked = unpack_upper(torch.arange(1.0, 7.0).double(), 3)
    assert unpacked.tolist() == [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
    assert unpacked.dtype == torch.float64
