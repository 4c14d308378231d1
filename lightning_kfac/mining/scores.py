"""How likely each window of a corpus is drawn, in a Parquet file: written and read a piece at a time.

A row is a window: ``document`` (its number in the corpus), ``start`` (in tokens of the document), ``log_p`` (natural
logarithm of the probability that one sample of the model holds its suffix word for word; -inf where none can) and
``strict`` (it is recited greedily). Where a search left a window out, both are null: it was not measured, which is not
a probability of 0. The file's metadata say what the figures depend on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_kfac.data.records import open_parquet, reading
from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional import Decoding

WINDOWS = "windows.parquet"
ABOUT = b"lightning_kfac"
COLUMNS = ("document", "start", "log_p", "strict")
ROWS_AT_ONCE = 1 << 16


class Scores:
    """What a search says of some windows.

    Args:
        decoding: How tokens are drawn.

    Attributes:
        columns: Lists by name of column, one entry a window.
    """

    def __init__(self, decoding: Decoding):
        self.decoding = decoding
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, document: int, start: int, log_p: float | None = None, strict: bool | None = None) -> None:
        """Adds a window; without a probability it was not measured."""
        for name, value in zip(COLUMNS, (document, start, log_p, strict), strict=True):
            self.columns[name].append(value)


def write_windows(path: Path, batches: Iterable[Mapping[str, list[Any]]], about: Mapping[str, Any]) -> None:
    """Writes columns batch by batch: memory holds a fixed number of rows, however many there are.

    Args:
        path: The file.
        batches: Columns of ``Scores``.
        about: What the figures depend on; what JSON makes of it is kept.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = zip(COLUMNS, ("int32", "int32", "float64", "bool"), strict=True)
    fields = [(name, pyarrow.type_for_alias(kind)) for name, kind in types]
    schema = pyarrow.schema(fields, metadata={ABOUT: json.dumps(about)})
    with ParquetWriter(str(path), schema, compression="zstd", write_page_checksum=True) as writer:
        held: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for columns in batches:
            for name in COLUMNS:
                held[name] += columns[name]
            if len(held["start"]) >= ROWS_AT_ONCE:
                writer.write_table(pyarrow.table(held, schema))
                held = {name: [] for name in COLUMNS}
        writer.write_table(pyarrow.table(held, schema))


def about_windows(path: Path) -> dict[str, Any]:
    """What the figures of a file depend on.

    Raises:
        InputError: It is not there, or no file of windows.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; `predict` writes it into its folder")
    with reading(path), open_parquet(path) as file:
        kept = (file.schema_arrow.metadata or {}).get(ABOUT)
        if kept is None:
            raise InputError(f"{path}: `predict` did not write this file")
        about = json.loads(kept)
    return about if isinstance(about, dict) else {}


def read_windows(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Columns of a file, some rows at a time: int32, int32, float64 (NaN where nothing was measured).

    Raises:
        InputError: The file is damaged: pages have checksums, and the rows are counted.
    """
    with reading(path), open_parquet(path) as file:
        about = file.metadata
        counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        left = sum(counts)
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS[:3])):
            left -= batch.num_rows
            yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in COLUMNS[:3]}
        if left or about.num_rows != sum(counts):
            raise InputError(f"{path}: damaged: it does not hold as many rows as it says; search again")
