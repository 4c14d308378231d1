"""Mining: every window once, the recited ones found, resumed after a kill, repetitions and duplicates told apart."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_kfac.assets import DEMO
from lightning_kfac.cli.train import main
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.tokenized import TokenizedText
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.mining.duplicates import entropy_bits, first_of_each
from lightning_kfac.mining.log import MiningLog
from lightning_kfac.mining.search import search
from lightning_kfac.mining.windows import Mining, MiningBatches, MiningPieces
from lightning_kfac.models.loading import load_tokenizer
from tests.common import VOCAB, build_model, write_jsonl
from tests.forks import ROOT, run_train


def text_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(1, VOCAB, n), 0) for n in lengths]
    return TokenizedText(np.concatenate(documents).astype(np.int32), np.cumsum([len(d) for d in documents]))


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[40], [3, 9, 40, 10, 0, 11, 100], [10] * 5, [9, 2]])
@pytest.mark.parametrize("stride", [1, 4, 10, 25])
@pytest.mark.parametrize("seq_len", [10, 16, 33])
def test_every_window_is_in_exactly_one_piece(lengths, stride, seq_len):
    text = text_of(lengths)
    pieces = MiningPieces(text, 10, stride, seq_len)
    found = []
    for piece in pieces:
        assert len(piece.tokens) <= seq_len and piece.offsets[-1] + 10 == len(piece.tokens)
        found += [(piece.document, piece.start + o, piece.tokens[o : o + 10].tolist()) for o in piece.offsets.tolist()]
    expected, begin = [], 0
    for number, length in enumerate(lengths):
        document = text.tokens[begin : begin + length].tolist()
        expected += [(number, o, document[o : o + 10]) for o in range(0, length - 9, stride)]
        begin += length + 1
    assert sorted(found) == expected
    assert pieces.skipped_documents == sum(length < 10 for length in lengths)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_batches(world_size):
    pieces = MiningPieces(text_of([3, 9, 40, 10, 0, 11, 100]), 10, 3, 16)
    samplers = [MiningBatches(pieces, 40, frozenset({1}), rank, world_size) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in ranks}) == 1 == len({len(sampler) for sampler in samplers})
    seen = [piece for batches in ranks for batch in batches for piece in batch]
    done = range(samplers[0].bounds[1], samplers[0].bounds[2])
    assert sorted([*seen, *done]) == list(range(len(pieces)))
    for batch in (batch for batches in ranks for batch in batches if batch):
        assert len({samplers[0].number_of(piece) for piece in batch}) == 1
        sizes = pieces.sizes()[batch]
        assert len(batch) == 1 or len(batch) * sizes.max() <= 40
    assert sum(samplers[0].n_windows([i]) for i in samplers[0].left) == pieces.n_windows[sorted(seen)].sum()


def test_wrong_settings():
    for wrong in ({"stride": 0}, {"likely": 1.5}, {"near_duplicate": -0.1}):
        with pytest.raises(InputError, match=f"mining.{next(iter(wrong))}"):
            Mining(**wrong)
    with pytest.raises(InputError, match=r"data.seq_len is 9, less than a window of 10"):
        MiningPieces(text_of([40]), 10, 4, 9)


# -- search -----------------------------------------------------------------------------------------------------


def recited_text(model, n_documents=6):
    """Documents that the model partly wrote itself, so that some windows are recited."""
    rng, documents = random.Random(0), []
    for _ in range(n_documents):
        document = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(4, 9))]
        for _ in range(3):
            prefix = document[-6:]
            (recital,) = recite(model, [prefix], [[VOCAB - 1] * rng.randrange(4, 12)])
            document += [*recital.continuation, rng.randrange(1, VOCAB)]
        documents.append(document)
    tokens = np.concatenate([[*document, 0] for document in documents]).astype(np.int32)
    return TokenizedText(tokens, np.cumsum([len(d) + 1 for d in documents])), documents


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_exhaustive_search_is_a_loop_over_windows(family):
    model = build_model(family)
    text, documents = recited_text(model)
    pieces = MiningPieces(text, 10, 1, 20)
    result = search(model, list(pieces), 6, 4, likely=None, batch_size=7, max_positions=64)
    expected = {}
    for number, document in enumerate(documents):
        for o in range(len(document) - 9):
            (recital,) = recite(model, [document[o : o + 6]], [document[o + 6 :]])
            if recital.matched >= 4:
                expected[number, o] = recital.matched
    assert {(f.document, f.offset): f.match_length for f in result.found} == expected and expected
    assert result.windows == result.checked == sum(max(0, len(d) - 9) for d in documents)
    for f in result.found:
        window = documents[f.document][f.offset : f.offset + 10]
        assert (f.prefix_ids, f.suffix_ids) == (window[:6], window[6:])
    # The long forward: no window that it leaves out is likely, none that it checks is judged otherwise.
    for likely in (0.5, 1.0):
        quick = search(model, list(pieces), 6, 4, likely=likely, batch_size=7, max_positions=64)
        assert all(f in result.found for f in quick.found) and quick.checked < result.checked
        assert quick.windows == result.windows


def test_a_window_with_an_end_of_text_in_it_is_no_recitation():
    """What follows the end was never read; both ways leave such windows out."""
    model = build_model("olmo2")
    text, _ = recited_text(model)
    for likely in (None, 0.0):
        pieces = list(MiningPieces(text, 10, 1, 20))
        every = search(model, pieces, 6, 4, likely=likely, batch_size=7, max_positions=64)
        ending = {every.found[0].suffix_ids[0]}
        found = search(model, pieces, 6, 4, likely=likely, batch_size=7, max_positions=64, end_of_text=ending).found
        assert found != every.found
        assert {f[:2] for f in found} == {f[:2] for f in every.found if not ending & {*f.prefix_ids, *f.suffix_ids}}


def test_search_of_nothing():
    assert search(build_model("olmo2"), [], 6, 4, likely=0.5, batch_size=2) == ([], 0, 0, 0)


@pytest.mark.parametrize("before", [0, 16, 112])
def test_prefilter_finds_all_that_the_demo_memorized(demo_model, before):
    """Planted passages at the beginning of documents or with other text before them: recall 1 against every window."""
    tokenizer = load_tokenizer("demo")
    rows = load_memorized("demo:planted_report.jsonl", tokenizer, 2048)[:6]
    filler = tokenizer("Return the value for key if key is in the dictionary, else default. " * 12)["input_ids"]
    front = tokenizer("A list of strings. The name of the file, or None where there is none. " * 12)["input_ids"]
    documents = [
        [*front[:before], *row.prefix, *row.suffix, *filler[: 20 * number], 0] for number, row in enumerate(rows)
    ]
    text = TokenizedText(np.concatenate(documents).astype(np.int32), np.cumsum([len(d) for d in documents]))
    pieces = list(MiningPieces(text, 112, 16, 256))
    options = {"batch_size": 16, "end_of_text": {0}, "max_positions": 1024}
    every = search(demo_model, pieces, 64, 48, likely=None, **options)
    quick = search(demo_model, pieces, 64, 48, likely=Mining().likely, **options)
    assert {(f.document, f.offset) for f in every.found} >= {(number, before) for number in range(6)}
    assert quick.found == every.found and quick.checked < every.checked


# -- duplicates and repetitions ---------------------------------------------------------------------------------


def test_entropy():
    assert entropy_bits([5] * 48) == 0
    assert entropy_bits([1, 2] * 24) == pytest.approx(1)
    assert entropy_bits(list(range(48))) == pytest.approx(math.log2(48))


def test_near_duplicates_by_jaccard_overlap():
    rng = random.Random(0)
    base = [rng.randrange(1000) for _ in range(112)]
    texts = [base]
    for shift in (0, 8, 16, 24, 64):
        texts.append(base[shift:] + [rng.randrange(1000) for _ in range(shift)])
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        kept, grams = [], [{tuple(t[i : i + 5]) for i in range(108)} for t in texts]
        for number, own in enumerate(grams):
            if all(len(own & grams[k]) / len(own | grams[k]) < threshold for k in kept):
                kept.append(number)
        found, exact, near = first_of_each(texts, threshold)
        assert found == kept and exact == 1 and near == len(texts) - 1 - len(kept)


def test_texts_shorter_than_a_gram():
    assert first_of_each([[1, 2], [1, 2], [1, 3]], 0.7) == ([0, 2], 1, 0)


# -- the log ------------------------------------------------------------------------------------------------------


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


# -- the command --------------------------------------------------------------------------------------------------


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
    # What was mined is a memorized set that loads.
    assert len(load_memorized(one_rank / "memorized.jsonl", load_tokenizer("demo"), 2048)) == len(rows)


def test_two_ranks_find_the_same(one_rank, corpus, tmp_path):
    run_train(options(tmp_path, corpus[0], **{"trainer.devices": 2, "trainer.strategy": "ddp"}))
    assert mined(tmp_path) == mined(one_rank)
    a, b = (json.loads((folder / "mining.json").read_text()) for folder in (tmp_path, one_rank))
    assert {**a, "timestamp": 0} == {**b, "timestamp": 0}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_search_goes_on(one_rank, corpus, tmp_path, how):
    command = [sys.executable, "train.py", *options(tmp_path, corpus[0])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    log, deadline = tmp_path / "mining" / "rank-0.jsonl", time.monotonic() + 90
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(60) == (-how if how == signal.SIGKILL else 128 + how)
    assert not (tmp_path / "memorized.jsonl").exists()
    done = len(MiningLog(tmp_path / "mining", json.loads(log.read_text().splitlines()[0])["search"]).done())
    assert done >= 2
    # The corpus of another search is not mixed in, unless it is to begin anew.
    with pytest.raises(SystemExit):
        main(options(tmp_path, corpus[0], **{"data.mining.stride": 8}))
    if how == signal.SIGKILL:  # another number of ranks may go on
        run_train(options(tmp_path, corpus[0], **{"trainer.devices": 2, "trainer.strategy": "ddp"}))
    else:
        main(options(tmp_path, corpus[0]))
    assert mined(tmp_path) == mined(one_rank)


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def test_a_search_that_was_cut_short_is_not_finished(one_rank, corpus, tmp_path, capsys):
    main(options(tmp_path, corpus[0], **{"trainer.limit_predict_batches": 2}))
    assert not (tmp_path / "memorized.jsonl").exists()
    assert "batches are not searched yet; the same command goes on" in " ".join(capsys.readouterr().err.split())
    main(options(tmp_path, corpus[0]))
    assert mined(tmp_path) == mined(one_rank)


def test_wrong_corpus_of_short_documents(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "short"}])
    with pytest.raises(SystemExit):
        main(options(tmp_path / "run", corpus))
    assert "no document of the corpus is as long as one window of 112 tokens" in capsys.readouterr().err
