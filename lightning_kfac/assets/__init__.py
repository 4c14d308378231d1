"""Files that ship inside the package: the demo model, its tokenizer and its planted sequences."""

from pathlib import Path

from lightning_kfac.errors import InputError

DEMO = Path(__file__).parent / "demo"


def resolve_path(path: str | Path) -> Path:
    """Turns ``demo`` and ``demo:FILE`` into a path inside the package; leaves every other path alone.

    Example:
        >>> resolve_path("demo:planted_report.jsonl").name
        'planted_report.jsonl'
        >>> str(resolve_path("runs/mine.jsonl"))
        'runs/mine.jsonl'
    """
    if str(path) == "demo":
        return DEMO
    if not str(path).startswith("demo:"):
        return Path(path)
    name = str(path).removeprefix("demo:")
    files = sorted(p.name for p in DEMO.iterdir()) if DEMO.is_dir() else []
    if name not in files:
        raise InputError(f"{path}: the embedded demo has no file {name!r}; it has {', '.join(files)}")
    return DEMO / name
