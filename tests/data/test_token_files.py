"""Files of token ids: what kind they are, and that every document comes out once, wherever it lies."""

import numpy as np
import pytest

from lightning_kfac import InputError
from lightning_kfac.data import token_files
from lightning_kfac.data.token_files import TokenKind, split_at, token_sources

KIND = TokenKind(eos=0, known=50_000, vocab_size=50_000)


def read(file, kind=KIND):
    return [document.ids for source in token_sources(file, kind) for document in source]


def documents(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, 50_000, rng.integers(0, longest)), 0) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("bare", [True, False])
def test_every_document_comes_once(tmp_path, monkeypatch, dtype, bare):
    """Stretches of 100 ids: most documents cross an edge, none is longer than a stretch."""
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 100)
    made = documents(300, 95)
    ids = np.concatenate(made).astype(dtype)
    if bare:
        ids.tofile(tmp_path / "a.npy")
    else:
        np.save(tmp_path / "a.npy", ids)
    found = read(tmp_path / "a.npy")
    assert len(token_sources(tmp_path / "a.npy", KIND)) > 100
    assert sorted(map(bytes, (np.asarray(part, np.int64) for part in found))) == sorted(
        map(bytes, (part.astype(np.int64) for part in made))
    )


@pytest.mark.parametrize("longest", [30, 400, 3000])
@pytest.mark.parametrize("seed", range(5))
def test_no_id_is_lost_or_read_twice(tmp_path, monkeypatch, longest, seed):
    """Also where documents are longer than a stretch, and where the last does not end."""
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 100)
    ids = np.concatenate(documents(40, longest, seed))[:-3].astype("<u2")
    ids.tofile(tmp_path / "a.npy")
    assert np.array_equal(np.concatenate(read(tmp_path / "a.npy")), ids)


def test_ids_without_an_end_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 100)
    ids = np.arange(1, 951, dtype="<u2")
    ids.tofile(tmp_path / "a.npy")
    found = read(tmp_path / "a.npy")
    assert [len(part) for part in found] == [100] * 9 + [50] and np.array_equal(np.concatenate(found), ids)


def test_rows_of_a_table(tmp_path):
    rows = np.array([[5, 6, 0, 7], [8, 9, 10, 0]])
    np.save(tmp_path / "a.npy", rows)
    assert [part.tolist() for part in read(tmp_path / "a.npy")] == [[5, 6, 0], [7], [8, 9, 10, 0]]
    assert [part.tolist() for part in split_at(np.array([0, 0, 4]), 0)] == [[0], [0], [4]]


def test_two_bytes_or_four(tmp_path):
    """Read as four bytes, two ids of two bytes lie beyond any vocabulary; ids of a large one do not fit into two."""
    ids = np.arange(1, 1001)
    for dtype in ("<u2", "<u4"):
        ids.astype(dtype).tofile(tmp_path / "a.npy")
        assert np.array_equal(np.concatenate(read(tmp_path / "a.npy")), ids)
    large = TokenKind(eos=0, known=100_278, vocab_size=100_352)
    ids = np.arange(99_000, 100_000)
    ids.astype("<u4").tofile(tmp_path / "a.npy")
    assert np.array_equal(np.concatenate(read(tmp_path / "a.npy", large)), ids)
    np.arange(1, 1001, dtype="<u2").tofile(tmp_path / "a.npy")
    with pytest.raises(InputError, match="neither uint32 nor uint16 ids of a tokenizer of 100,278 tokens"):
        read(tmp_path / "a.npy", large)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3), "token ids must be integers in one or two dimensions, found float64"),
        (np.ones((2, 2, 2), int), "in one or two dimensions, found int64 in 3"),
        (np.array([1, 60_000]), r"ids beyond the model's vocabulary \(0 to 49999\); they were made with another"),
        (np.array([1, -100]), "ids beyond the model's vocabulary"),
        (np.array([{}], dtype=object), "no array of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.npy")


def test_files_that_hold_no_ids(tmp_path):
    (tmp_path / "a.npy").write_bytes(np.full(999, 60_000, "<u2").tobytes())
    with pytest.raises(InputError, match=r"a\.npy: neither uint32 nor uint16 .* they were made with another tokenizer"):
        read(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.arange(100))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-50])
    with pytest.raises(InputError, match=r"a\.npy: no array of numbers"):
        read(tmp_path / "a.npy")
