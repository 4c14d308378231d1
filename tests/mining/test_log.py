"""The log of a search."""

import pytest

from lightning_kfac.errors import InputError
from lightning_kfac.mining.log import MiningLog


def test_a_torn_line_is_done_again(tmp_path):
    log = MiningLog(tmp_path, "a")
    for batch in (3, 5):
        log.append(0, {"batch": batch, "windows": 1})
    MiningLog(tmp_path, "a").append(1, {"batch": 4, "windows": 2})
    path = tmp_path / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed in the middle of a line
    again = MiningLog(tmp_path, "a")
    assert again.done() == {3, 4}
    again.append(0, {"batch": 5, "windows": 7})
    assert {row["batch"]: row["windows"] for row in MiningLog(tmp_path, "a").rows()} == {3: 1, 4: 2, 5: 7}
    with pytest.raises(InputError, match="unfinished search of another model"):
        MiningLog(tmp_path, "b")


def test_batches_are_read_in_their_order(tmp_path):
    """As several ranks, and searches that were stopped, have left them; each as its first whole line has it."""
    for rank, batches in ((0, (4, 0, 7)), (1, (5, 1, 0))):
        log = MiningLog(tmp_path, "a")
        for batch in batches:
            log.append(rank, {"batch": batch, "scores": [rank, batch]})
    with open(tmp_path / "rank-0.jsonl", "a") as file:
        file.write('{"batch": 2, "sco')
    assert [row["scores"] for row in MiningLog(tmp_path, "a").in_order()] == [[0, 0], [1, 1], [0, 4], [1, 5], [0, 7]]
