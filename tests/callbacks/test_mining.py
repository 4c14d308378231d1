"""Runs of train.py that mine: the planted passages are found, and a search goes on after a kill."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from lightning_kfac.assets import DEMO
from lightning_kfac.cli.train import main
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.errors import InputError
from lightning_kfac.mining.log import MiningLog
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from tests.common import write_jsonl
from tests.forks import Run, run_train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Planted passages, one of them twice, text that the model repeats for ever, and ordinary text."""
    rows = [json.loads(line) for line in (DEMO / "planted_report.jsonl").open()]
    tokenizer = load_tokenizer("demo")
    pairs = [(row["prefix"] + row["suffix"], row["prefix_ids"] + row["suffix_ids"]) for row in rows]
    whole = [text for text, ids in pairs if tokenizer(text)["input_ids"] == ids][:6]
    ordinary = [f"Item {n} of a list. " * 40 for n in range(5)]
    folder = tmp_path_factory.mktemp("corpus")
    texts = [*whole, whole[0], "1, 1, 1, 1," + " 2," * 200, "short", *ordinary]
    return write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in texts]), whole


def options(folder, corpus, **changes):
    settings = {
        "config": "configs/mine.yaml",
        "data.corpus": corpus,
        "data.batch_size": 1,
        "data.seq_len": 144,
        "trainer.default_root_dir": folder,
        **changes,
    }
    return ["predict", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def mined(folder, name="memorized.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mined") / "run"
    main(options(folder, corpus[0]))
    return folder


def test_mining_finds_the_planted_passages(one_rank, corpus):
    rows = mined(one_rank)
    texts = {row["prefix"] + row["suffix"] for row in rows}
    assert set(corpus[1]) <= texts
    assert {"document", "offset", "match_length", "entropy_bits", "prefix_ids", "suffix_ids"} <= set(rows[0])
    summary = json.loads((one_rank / "mining.json").read_text())
    repetitions = mined(one_rank, "repetitions.jsonl")
    assert repetitions and {row["document"] for row in repetitions} == {7}
    assert all(row["entropy_bits"] < 2 for row in repetitions) and all(row["entropy_bits"] >= 2 for row in rows)
    assert summary["exact_duplicates"] >= 1 and summary["kept"] == len(rows)
    left_out = summary["exact_duplicates"] + summary["near_duplicates"] + summary["repetitions"]
    assert summary["recited"] == summary["kept"] + left_out and summary["repetitions"] == len(repetitions)
    # What was mined is a memorized set that loads, with the tokenizer that made it and no other.
    tokenizer = load_tokenizer("demo")
    known = tokenizer_fingerprint(tokenizer)
    assert {part["tokenizer_fingerprint"] for part in (summary, *rows, *repetitions)} == {known}
    assert len(load_memorized(one_rank / "memorized.jsonl", tokenizer, 2048)) == len(rows)
    tokenizer.add_tokens(["forsooth"])
    with pytest.raises(InputError, match=f"line 1: the ids were made by another tokenizer \\({known[:8]}\\)"):
        load_memorized(one_rank / "memorized.jsonl", tokenizer, 2048)


def test_two_ranks_find_the_same(one_rank, corpus, tmp_path):
    run_train(options(tmp_path, corpus[0], **{"trainer.devices": 2, "trainer.strategy": "ddp"}))
    assert mined(tmp_path) == mined(one_rank)
    a, b = (json.loads((folder / "mining.json").read_text()) for folder in (tmp_path, one_rank))
    assert {**a, "timestamp": 0} == {**b, "timestamp": 0}
    assert windows_of(tmp_path) == windows_of(one_rank)


def windows_of(folder):
    """Document, start, log p and verdict of each window, None where it was not measured."""
    return [tuple(row.values()) for row in read_table(Path(folder) / "windows.parquet").to_pylist()]


def test_every_window_is_in_the_file_of_windows(one_rank, corpus):
    found = windows_of(one_rank)
    summary = json.loads((one_rank / "mining.json").read_text())
    assert len({row[:2] for row in found}) == len(found) == summary["windows"]
    assert sum(log_p is not None for _, _, log_p, _ in found) == summary["checked"] < summary["windows"]
    assert sum(bool(strict) for *_, strict in found) == summary["recited"]
    assert {document for document, start, log_p, _ in found if start == 0 and (log_p or -99) > math.log(0.01)} >= {
        *range(7)
    }
    assert (one_rank / "windows.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_is_compared_with_an_earlier_one(one_rank, corpus, tmp_path, capsys):
    """What the first measured the second measures too, whatever it finds likely itself."""
    changed = {"data.mining.before": one_rank, "data.mining.likely": 1.0}
    main(options(tmp_path / "run", corpus[0], **changed))
    for first, second in zip(windows_of(one_rank), windows_of(tmp_path / "run"), strict=True):
        assert first[:2] == second[:2] and first[3] == second[3]
        assert second[2] == (None if first[2] is None else pytest.approx(first[2], abs=1e-3))
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert b"mining/where documents come out" in events.read_bytes()
    for setting, value, said in (
        ("data.mining.stride", 8, "its stride is 16, here it is 8"),
        ("model.measures.extraction.top_k", 7, "its top_k is 40, here it is 7"),
        ("data.mining.before", tmp_path, "no such file; `predict` writes it into its folder"),
        ("model.measures.extraction", "null", "model.measures.extraction must not be null"),
    ):
        with pytest.raises(SystemExit):
            main(options(tmp_path / "other", corpus[0], **{**changed, setting: value}))
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_search_goes_on(one_rank, corpus, forks, tmp_path, how):
    folder = tmp_path / "run"
    pid = forks.start(Run(options(folder, corpus[0]), str(tmp_path / "said")))
    log, deadline = folder / "mining" / "rank-0.jsonl", time.monotonic() + 90
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, how)
    assert forks.wait(pid, 60) == (-how if how == signal.SIGKILL else 128 + how)
    assert not (folder / "memorized.jsonl").exists()
    done = len(MiningLog(folder / "mining", json.loads(log.read_text().splitlines()[0])["search"]).done())
    assert done >= 2
    # The corpus of another search is not mixed in, unless it is to begin anew.
    with pytest.raises(SystemExit):
        main(options(folder, corpus[0], **{"data.mining.stride": 8}))
    if how == signal.SIGKILL:  # another number of ranks may go on
        run_train(options(folder, corpus[0], **{"trainer.devices": 2, "trainer.strategy": "ddp"}))
    else:
        main(options(folder, corpus[0]))
    assert mined(folder) == mined(one_rank)


def test_a_search_that_was_cut_short_is_not_finished(one_rank, corpus, tmp_path, capsys):
    main(options(tmp_path, corpus[0], **{"trainer.limit_predict_batches": 2}))
    assert not (tmp_path / "memorized.jsonl").exists()
    assert "batches are not searched yet; the same command goes on" in " ".join(capsys.readouterr().err.split())
    main(options(tmp_path, corpus[0]))
    assert mined(tmp_path) == mined(one_rank) and windows_of(tmp_path) == windows_of(one_rank)


def test_wrong_corpus_of_short_documents(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "short"}])
    with pytest.raises(SystemExit):
        main(options(tmp_path / "run", corpus))
    assert "no document of the corpus is as long as one window of 112 tokens" in capsys.readouterr().err
