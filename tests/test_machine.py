"""What a benchmark says of its machine, and that it concludes nothing on a busy one."""

import os
import time

import pytest

from benchmarks.machine import Reading, Seconds, Watch, busy_seconds, instruction_sets, is_busy, medians, pairs, ratios

STAT = "cpu  700 100 150 5000 50 0 40 10 3 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n"


def test_busy_seconds_are_those_of_no_idle_column():
    """User, nice, system, interrupts and stolen time; guests are in user time already."""
    assert busy_seconds(STAT) == (700 + 100 + 150 + 0 + 40 + 10) / os.sysconf("SC_CLK_TCK")


def test_what_others_use_is_what_is_not_ours():
    before, after = Reading(wall=10.0, busy=100.0, own=5.0), Reading(wall=14.0, busy=107.0, own=8.0)
    assert after.others(before) == pytest.approx((7 - 3) / 4)
    assert Reading(14.0, 102.0, 8.0).others(before) == 0  # ticks are coarse: never less than nothing
    assert Reading(14.0, None, 8.0).others(before) is None


def test_instruction_sets_in_one_order():
    x86 = "processor : 0\nflags\t\t: fpu sse2 avx512_bf16 fma avx2 avx512f\nprocessor : 1\nflags : amx_bf16\n"
    assert instruction_sets(x86) == ["avx2", "fma", "avx512f", "avx512_bf16"]
    assert instruction_sets("Features : fp asimd bf16\n") == ["asimd", "bf16"]
    assert instruction_sets("") == []


@pytest.mark.parametrize(("share", "busy"), [(0.0, False), (0.04, False), (0.06, True), (1.0, True)])
def test_a_twentieth_of_the_cores_is_busy(share, busy):
    assert is_busy(share * os.cpu_count()) is busy
    assert is_busy(None)


def test_no_conclusion_on_a_busy_machine(monkeypatch, capsys):
    """Neither where it is busy before the run, nor where it becomes so."""
    found = []
    for others in ([0.5, 0.0], [0.0, 0.5], [0.0, 0.0]):
        cores = iter([share * os.cpu_count() for share in (*others, others[1])])
        monkeypatch.setattr(Reading, "others", lambda self, earlier, cores=cores: next(cores))
        watch = Watch(seconds=0)
        about = watch.about()
        assert about["concluded"] is not about["busy"]
        watch.conclude("ours is twice as fast")
        found.append((about["concluded"], capsys.readouterr().out))
    (early, first), (late, second), (quiet, third) = found
    assert (early, late, quiet) == (False, False, True)
    assert first.startswith("the machine is busy: other processes use ") and "wall times do not count" in first
    assert "no conclusion" in first and "no conclusion" in second and "twice" not in first + second
    assert third.startswith("the machine is quiet") and third.endswith("ours is twice as fast\n")


def test_pairs_turn_the_order_round():
    calls = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = pairs(ways, repeats=2)
    assert "".join(calls) == "cba" + "abc" + "cba"  # the first round is to warm up
    assert all(len(values) == 2 for of in times.values() for values in of.values())
    assert list(times) == ["a", "b", "c"]


def test_cpu_time_does_not_count_waiting_and_a_way_may_time_itself():
    times = pairs({"waits": lambda: time.sleep(0.05), "says": lambda: Seconds(3.0, 2.0)}, repeats=1, warm_up=0)
    assert times["says"] == {"wall": [3.0], "cpu": [2.0]}
    assert times["waits"]["wall"][0] >= 0.05 > times["waits"]["cpu"][0]


def test_ratios_are_of_pairs_not_of_medians():
    """The machine is three times slower in the second round, for both ways."""
    times = {"ours": {"wall": [1.0, 3.0, 1.0], "cpu": [1.0] * 3}, "theirs": {"wall": [2.0, 6.0, 4.0], "cpu": [5.0] * 3}}
    assert ratios(times, "theirs", "ours") == {"wall": 2.0, "cpu": 5.0}
    assert medians(times)["theirs"] == {"wall": 4.0, "cpu": 5.0}
