"""Documents that are files of text: how they are read from their beginning and from a place within."""

import gzip

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.documents import TextFile, opened


def test_text_is_read_as_python_reads_it(tmp_path):
    file = tmp_path / "a.txt"
    contents = "\ufeffone\r\ntwo é\rthree\n" * 30_000
    file.write_bytes(contents.encode())
    expected = file.read_text("utf-8-sig")
    assert TextFile(file).text() == expected
    with TextFile(file).opened() as stream:
        pieces = [stream.read(1000) for _ in range(3)]
    assert "".join(pieces) == expected[:3000] and all(len(piece) == 1000 for piece in pieces)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(contents.encode()))
    assert TextFile(tmp_path / "a.txt.gz").text() == expected and TextFile(tmp_path / "a.txt.gz").size is None


@pytest.mark.parametrize("skip", range(1, 24))
def test_from_a_place_within_it_begins_at_a_line(tmp_path, skip):
    """Bytes within a character are no text."""
    text = "line é one\nzwei größer\n三行目です\nlast line\n"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    with opened(TextFile(tmp_path / "a.txt"), skip) as stream:
        found = stream.read(100)
    assert text.endswith("\n" + found) and len(found.encode()) < len(text.encode()) - skip
    assert found in [text[place + 1 :] for place in range(len(text)) if text[place] == "\n"]
    with opened(text, skip) as stream:
        assert text.endswith("\n" + stream.read(100))


def test_one_endless_line(tmp_path):
    (tmp_path / "a.txt").write_text("ä" * 9000 + " word")
    with opened(TextFile(tmp_path / "a.txt"), 101) as stream:
        assert stream.read(1 << 20) == "ä" * (9000 - 51) + " word"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"one\n" * 40_000 + b"tw\xffo\n" * 3, "invalid start byte at byte 160,002; convert it"),
        (b"one \xc3", "it ends within a character at byte 4; bring it here again"),
        ("two bytes a character".encode("utf-16"), r"it is UTF-16; convert it \(iconv -f UTF-16 -t UTF-8\)"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, contents, message):
    (tmp_path / "a.txt").write_bytes(contents)
    with pytest.raises(InputError, match=rf"a\.txt: not UTF-8 text: {message}"):
        TextFile(tmp_path / "a.txt").text()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 9999)[:-12])
    with pytest.raises(InputError, match=r"a\.txt\.gz: cut off"):
        TextFile(tmp_path / "a.txt.gz").text()
