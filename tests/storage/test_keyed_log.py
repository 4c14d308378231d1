"""Logs go on after a stop, and take no line that a kill or a disk has changed."""

import json

import pytest

from lightning_kfac.storage.json_files import row_of_line, sealed_line
from lightning_kfac.storage.keyed_log import KeyedLog
from tests.tally import DAMAGED, tally

ROWS = [{"batch": 3, "found": [[0.25, "é"]]}, {"batch": 4, "found": []}]


@pytest.fixture
def log(tmp_path):
    log = KeyedLog(tmp_path / "log.jsonl", "search", "0f3a")
    for row in ROWS:
        log.append(row)
    return log


def test_no_flipped_bit_is_believed(log):
    contents = log.path.read_bytes()
    head = contents.index(b"\n")
    unchanged = 0
    for place in range(len(contents)):
        for bit in range(8):
            log.path.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << bit]) + contents[place + 1 :])
            tally(DAMAGED)
            again = KeyedLog(log.path, "search", "0f3a")
            assert all(row in ROWS for row in again.rows()), (place, bit)
            unchanged += place > head and list(again.rows()) == ROWS
    assert unchanged < 20  # white space, and the case of an escaped letter


def test_cut_anywhere(log):
    contents = log.path.read_bytes()
    for length in range(len(contents)):
        log.path.write_bytes(contents[:length])
        tally(DAMAGED)
        again = KeyedLog(log.path, "search", "0f3a")
        kept = list(again.rows())
        assert kept == ROWS[: len(kept)]
        again.append({"batch": 9})
        assert list(KeyedLog(log.path, "search", "0f3a").rows()) == [*kept, {"batch": 9}]


def test_a_log_of_version_0_1_goes_on(tmp_path):
    """Its lines have no checksums; the ones behind them do."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"search": "0f3a"}\n{"batch": 1}\n{"batch"')
    KeyedLog(path, "search", "0f3a").append({"batch": 2})
    assert list(KeyedLog(path, "search", "0f3a").rows()) == [{"batch": 1}, {"batch": 2}]
    assert KeyedLog(path, "search", "other").is_ours is False


def test_lines_without_checksum_among_others_do_not_count(log):
    with open(log.path, "a") as file:
        file.write('{"batch": 7}\n')
    assert list(log.rows()) == ROWS


def test_a_checksum_does_not_depend_on_the_order_of_fields():
    row = json.loads(sealed_line({"b": [1, {"d": None, "c": 2.5}], "a": float("inf")}))
    assert row_of_line(json.dumps(dict(reversed(row.items())))) == {"a": float("inf"), "b": [1, {"c": 2.5, "d": None}]}
    assert row_of_line("[1]") is None and row_of_line("{") is None and row_of_line('{"a": 1}') is None
    assert row_of_line('{"a": 1}', sealed=False) == {"a": 1}
