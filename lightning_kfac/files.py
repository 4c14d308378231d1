"""Folders that appear under their name only when they are complete, and identities of what is in them."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 24


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which replaces ``path`` when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in partial.rglob("*.safetensors"):  # safetensors keeps new files to their owner; others may read ours
        file.chmod(0o644)
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def content_hash(files: Iterable[Path]) -> str:
    """Hash of names and contents, in the order given. 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:32]
