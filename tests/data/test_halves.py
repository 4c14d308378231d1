"""Halves share nothing, and what would give the measured one away is found."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.halves import GIVEN_AWAY, giving_away, seeded_halves, write_sequences
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized


def sequences(n, length=20):
    return [MemorizedSequence([1, number], [number * 100 + i for i in range(length)]) for number in range(n)]


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_halves_share_no_suffix_and_lose_nothing(n):
    rows = sequences(n)
    rows += [MemorizedSequence([9, 9], rows[0].suffix), rows[1]]  # another prefix, a repetition
    halves = seeded_halves(rows, 0, "a set")
    shown, reported = ({tuple(row.suffix) for row in half} for half in halves)
    assert not shown & reported and (len(shown), len(reported)) == (n // 2, n - n // 2)
    assert sorted(map(id, [*halves.shown, *halves.reported])) == sorted(map(id, rows))
    assert seeded_halves(rows, 0, "a set") == halves
    if n > 3:
        assert seeded_halves(rows, 1, "a set") != halves


@pytest.mark.parametrize("rows", [[], sequences(1), sequences(1) * 5])
def test_one_sequence_makes_no_halves(rows):
    with pytest.raises(InputError, match=r"^some\.jsonl: [01] sequence .* at least two"):
        seeded_halves(rows, 0, "some.jsonl")


def test_written_halves_are_read_as_they_are(tmp_path):
    rows = sequences(3)
    write_sequences(rows, tmp_path / "halves" / "shown.jsonl")
    found = load_memorized(tmp_path / "halves" / "shown.jsonl", None, 1000)
    assert [(list(s.prefix), list(s.suffix)) for s in found] == [(s.prefix, s.suffix) for s in rows]


def test_what_gives_a_reported_suffix_away():
    reported = [*sequences(2), MemorizedSequence([5], [7, 8, 9])]
    run = list(reported[1].suffix[3 : 3 + GIVEN_AWAY])
    rows = [
        MemorizedSequence([1], [*run, 1]),  # inside a suffix
        MemorizedSequence(run[:5], run[5:]),  # across the cut
        MemorizedSequence([1], [*run[:-1], 1]),  # one token less
        MemorizedSequence([6, 7, 8], [9]),  # a short suffix as a whole
        MemorizedSequence([7, 8], [6, 9]),
        MemorizedSequence([1, 0], [5] * 30),  # the prefix of a reported one
    ]
    assert giving_away(rows, reported) == [0, 1, 3]
