"""What a document may be: a text in memory, a file of text, or token ids."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_kfac.data.pieces import Stream
from lightning_kfac.data.records import CHUNK, COMPRESSION, open_file, reading
from lightning_kfac.errors import InputError

# Within so many characters the beginning of a line, or else of a word, is looked for.
EDGE_WITHIN = 1 << 12
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextFile:
    """A document that is a file of text, read as far as it is used.

    Raises:
        InputError: While it is read: it is no UTF-8 text, or cannot be read.
    """

    path: Path

    @property
    def size(self) -> int | None:
        """Bytes of text; None where it is compressed."""
        return None if self.path.suffix in COMPRESSION else self.path.stat().st_size

    def text(self) -> str:
        """All of it."""
        with self.opened() as stream:
            return stream.read(-1)

    @contextmanager
    def opened(self, skip: int = 0) -> Iterator[Stream]:
        """Its text from its beginning, or from the line (or word) that begins behind ``skip`` bytes.

        A mark of the byte order is left out, and lines end with a newline, as Python reads text.
        """
        with reading(self.path), open_file(self.path) as source:
            if skip:
                source.seek(skip)
                while (byte := source.read(1)) and byte[0] & 0xC0 == 0x80:  # within a character
                    skip += 1
                source.seek(skip)
            with io.TextIOWrapper(source, encoding="utf-8" if skip else "utf-8-sig") as text:
                yield _Text(text, self.path, from_edge=bool(skip))


@dataclass(frozen=True)
class TokenIds:
    """A document of token ids, as they are. int [n]."""

    ids: np.ndarray | Sequence[int]


Document = str | TextFile | TokenIds


class _Text:
    """A stream of text whose errors say where."""

    def __init__(self, stream: io.TextIOWrapper, path: Path, from_edge: bool):
        self._stream = stream
        self._path = path
        self._ahead = from_edge_on(self._decoded(EDGE_WITHIN)) if from_edge else ""

    def read(self, size: int, /) -> str:
        ahead = self._ahead if size < 0 else self._ahead[:size]
        self._ahead = self._ahead[len(ahead) :]
        return ahead + self._decoded(size if size < 0 else size - len(ahead))

    def _decoded(self, size: int) -> str:
        try:
            return self._stream.read(size)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: not UTF-8 text: {_where_not(self._path) or error.reason}") from None


def from_edge_on(text: str) -> str:
    """A text from the beginning of a line on, or of a word, where it has one within 4,096 characters.

    Example:
        >>> from_edge_on("lue of x.\\nReturn the key."), from_edge_on("lue of x")
        ('Return the key.', 'of x')
    """
    for sign in ("\n", " "):
        place = text.find(sign, 0, EDGE_WITHIN)
        if place >= 0:
            return text[place + 1 :]
    return text


@contextmanager
def opened(document: str | TextFile, skip: int) -> Iterator[Stream]:
    """The text of a document, see ``TextFile.opened``; ``skip`` are characters of a text in memory."""
    if isinstance(document, TextFile):
        with document.opened(skip) as stream:
            yield stream
    else:
        yield io.StringIO(from_edge_on(document[skip:]) if skip else document, newline="")


def _where_not(path: Path) -> str | None:
    """The first byte of a file that is no UTF-8, and what to do."""
    done = 0
    with open_file(path) as source:
        rest = b""
        while chunk := source.read(CHUNK):
            if done == 0 and not rest and chunk.startswith(UTF_16):
                return "it is UTF-16; convert it (iconv -f UTF-16 -t UTF-8)"
            data = rest + chunk
            try:
                data.decode("utf-8")
                rest = b""
            except UnicodeDecodeError as error:
                if len(data) - error.start >= 4:
                    return f"{error.reason} at byte {done + error.start:,}; convert it (iconv -t UTF-8)"
                rest = data[error.start :]
            done += len(data) - len(rest)
    return f"it ends within a character at byte {done:,}; bring it here again"
