"""results.jsonl: extraction and leaks are objects in the file and flat keys in memory; older files have none."""

import json

from lightning_kfac.storage.results import append_result, read_results, replace_result, write_results

ROW = {
    "stage": "baseline",
    "strict_acc": 1.0,
    "extraction.temperature": 1.0,
    "extraction.top_k": None,
    "extraction.median_log10_p": -2.5,
    "extraction.share_p.0.001": 0.75,
    "extraction.share_p.0.5": 0.25,
    "extraction.expected_at.10": 0.5,
    "my.set/extraction.median_log10_p": None,
    "my.set/extraction.expected_at.1": 0.125,
    "my.set/strict_acc": 0.5,
    "intervals": {"extraction.expected_at.10": [0.25, 0.75]},
    "measured": {"extraction": {"top_k": 40}},
}


def plain(row):
    return {key: value for key, value in row.items() if key not in ("timestamp", "version")}


def test_extraction_is_an_object_in_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    assert plain(append_result(path, ROW)) == ROW
    line = json.loads(path.read_text())
    assert line["extraction"] == {
        "temperature": 1.0,
        "top_k": None,
        "median_log10_p": -2.5,
        "share_p": {"0.001": 0.75, "0.5": 0.25},
        "expected_at": {"10": 0.5},
    }
    assert line["my.set/extraction"] == {"median_log10_p": None, "expected_at": {"1": 0.125}}
    assert line["measured"] == ROW["measured"] and line["intervals"] == ROW["intervals"]
    assert not any("extraction." in key for key in line)
    assert [plain(row) for row in read_results(path)] == [ROW]


def test_rows_that_are_written_again_stay_as_they_are(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, ROW)
    first = path.read_text()
    replace_result(path, {"stage": "edited", "strict_acc": 0.0}, ("stage",))
    assert path.read_text().startswith(first)
    replace_result(path, {"stage": "edited", "extraction.expected_at.1": 0.0}, ("stage",))
    assert path.read_text().startswith(first)
    assert json.loads(path.read_text().splitlines()[1])["extraction"] == {"expected_at": {"1": 0.0}}
    write_results(path, read_results(path)[:1])
    assert path.read_text() == first


def test_older_rows_are_read_as_they_are(tmp_path):
    path = tmp_path / "results.jsonl"
    old = {"stage": "baseline", "strict_acc": 0.5, "extraction": None}
    path.write_text(json.dumps(old) + "\n")
    assert read_results(path) == [old]


def test_a_damaged_row_of_a_sweep_is_measured_again(tmp_path):
    """Rows that a sweep goes on from have a checksum; those of older versions are taken as they are."""
    path = tmp_path / "results.jsonl"
    older = {"stage": "edited", "point": "a", "strict_acc": 0.5}
    path.write_text(json.dumps(older) + "\n")
    append_result(path, {"stage": "edited", "point": "b", "strict_acc": 0.25, "extraction.expected_at.10": 0.5})
    append_result(path, {"stage": "edited", "strict_acc": 0.125})
    rows = read_results(path)
    assert [row["strict_acc"] for row in rows] == [0.5, 0.25, 0.125] and not any("crc" in row for row in rows)
    write_results(path, rows)
    assert read_results(path) == rows
    path.write_text(path.read_text().replace("0.25", "0.24"))
    assert [row["strict_acc"] for row in read_results(path)] == [0.5, 0.125]


def test_leaks_are_an_object_in_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    row = {
        "leaks.members": 3,
        "leaks.nonmembers": 4,
        "leaks.loss.auc": 0.75,
        "leaks.loss.low": 0.5,
        "leaks.loss.high": None,
        "leaks.min_k_plus_plus.tpr_at_fpr_0.01": 0.25,
        "intervals": {"leaks.loss.auc": [0.5, None]},
        "measured": {"leaks": {"k": 0.2}},
    }
    append_result(path, row)
    line = json.loads(path.read_text())
    assert line["leaks"] == {
        "members": 3,
        "nonmembers": 4,
        "loss": {"auc": 0.75, "low": 0.5, "high": None},
        "min_k_plus_plus": {"tpr_at_fpr_0.01": 0.25},
    }
    assert line["intervals"] == row["intervals"] and line["measured"] == row["measured"]
    assert [plain(row) for row in read_results(path)] == [row]
