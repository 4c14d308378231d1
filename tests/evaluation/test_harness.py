"""Sample logs of lm-evaluation-harness, as version 0.4.13 writes them; a real run is in tests/test_lm_eval.py."""

import gzip

import pytest

from lightning_kfac import InputError
from lightning_kfac.evaluation.abilities import compare
from lightning_kfac.evaluation.harness import Reading, read_logs
from tests.common import write_jsonl

DATE = "2026-11-20T10-00-00.123456"


def sample(doc, score, metric="acc", **changes):
    row = {
        "doc_id": doc,
        "doc": {"question": f"{doc}?"},
        "target": "0",
        "arguments": {
            "gen_args_0": {"arg_0": f"Question: {doc}?\nAnswer:", "arg_1": " yes"},
            "gen_args_1": {"arg_0": f"Question: {doc}?\nAnswer:", "arg_1": " no"},
        },
        "resps": [[["-1.5", "False"]], [["-2.5", "False"]]],
        "filtered_resps": [["-1.5", "False"], ["-2.5", "False"]],
        "filter": "none",
        "metrics": [metric, "acc_norm"],
        "doc_hash": f"{doc:x}" * 64,
        "prompt_hash": "1" * 64,
        "target_hash": "2" * 64,
        metric: score,
        "acc_norm": 1.0 - score,
    }
    return row | changes


def log(folder, task, rows, date=DATE, model="me__model"):
    (folder / model).mkdir(parents=True, exist_ok=True)
    return write_jsonl(folder / model / f"samples_{task}_{date}.jsonl", rows)


def test_two_runs_are_paired_by_document(tmp_path):
    log(tmp_path / "a", "boolq", [sample(n, s) for n, s in enumerate([1.0, 1.0, 0.0, 1.0])])
    log(tmp_path / "b", "boolq", [sample(n, s) for n, s in ((3, 0.0), (1, 1.0), (2, 1.0), (7, 1.0))])
    before, after = ([one.answers for one in read_logs(tmp_path / name, Reading())] for name in "ab")
    ((task,), (group,)) = compare(before, after)
    assert (task.name, task.group, task.metric, task.source) == ("boolq", "open-book", "acc", "lm-eval")
    assert (task.n, task.lost, task.gained, task.chance) == (3, 1, 1, None) and group.name == "open-book"


def test_a_document_with_other_contents_is_another_one(tmp_path):
    log(tmp_path / "a", "x", [sample(0, 1.0), sample(1, 1.0)])
    log(tmp_path / "b", "x", [sample(0, 1.0), sample(1, 1.0, doc_hash="f" * 64)])
    before, after = ([one.answers for one in read_logs(tmp_path / name, Reading())] for name in "ab")
    assert compare(before, after)[0][0].n == 1


def test_the_newest_log_of_a_task_counts(tmp_path):
    log(tmp_path, "gsm8k_cot", [sample(0, 0.0)], "2026-11-19T23-59-59.9")
    log(tmp_path, "gsm8k_cot", [sample(0, 1.0)], "2026-11-20T00-00-00.1")
    log(tmp_path, "gsm8k", [sample(0, 0.0)])
    found = {one.answers.task: one.answers for one in read_logs(tmp_path, Reading(groups={"gsm8k": "mine"}))}
    assert list(found["gsm8k_cot"].scores.values()) == [1.0]
    assert (found["gsm8k_cot"].group, found["gsm8k"].group) == ("arithmetic", "mine")


def test_filters_and_metrics(tmp_path):
    filters = ("strict-match", 0.0), ("flexible-extract", 1.0)
    rows = [sample(n, s, "exact_match", filter=name, acc=0.5) for n in range(2) for name, s in filters]
    log(tmp_path, "gsm8k", rows)

    def scores(**metrics):
        (one,) = read_logs(tmp_path, Reading(metrics=metrics))
        return one.answers.metric, list(one.answers.scores.values())

    assert scores() == ("exact_match,strict-match", [0.0, 0.0])
    assert scores(gsm8k="exact_match,flexible-extract") == ("exact_match,flexible-extract", [1.0, 1.0])
    assert scores(gsm8k="acc") == ("acc,strict-match", [0.5, 0.5])
    with pytest.raises(InputError, match="no row has the filter 'none'"):
        scores(gsm8k="acc,none")


def test_prompts_of_files_and_of_older_ones(tmp_path):
    older = sample(1, 1.0, arguments=[["Old?", " yes"], ["Old?", " no"]])
    log(tmp_path, "x", [sample(0, 1.0), older, sample(2, 1.0, arguments=[])])
    assert read_logs(tmp_path, Reading())[0].prompts == ["Question: 0?\nAnswer:", "Old?"]


def test_compressed_logs(tmp_path):
    path = log(tmp_path, "x", [sample(0, 1.0)])
    (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert list(read_logs(tmp_path, Reading())[0].answers.scores.values()) == [1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([sample(0, 1.0), sample(0, 1.0)], "line 2: a document twice"),
        ([{"acc": 1.0}], "line 1: no doc_id"),
        ([sample(0, 1.0, acc=[1.0, 2])], r"line 1: acc is \[1.0, 2\]; a score lies in \[0, 1\]"),
        ([sample(0, 7.0)], r"line 1: acc is 7.0; a score lies in \[0, 1\]"),
        (
            [{"doc_id": 0, "metrics": ["word_perplexity"], "word_perplexity": [3, 4]}],
            "line 1: none of exact_match, .*; it has the metrics word_perplexity: name one",
        ),
        (["{"], "line 1"),
    ],
)
def test_logs_that_cannot_be_used(tmp_path, rows, message):
    write_jsonl(tmp_path / f"samples_x_{DATE}.jsonl", rows)
    with pytest.raises(InputError, match=message):
        read_logs(tmp_path, Reading())


def test_folders_without_logs(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_logs(tmp_path / "none", Reading())
    with pytest.raises(InputError, match="run lm_eval with --log_samples"):
        read_logs(tmp_path, Reading())
