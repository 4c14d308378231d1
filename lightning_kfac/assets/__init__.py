"""Files that ship inside the package: the demo models, their tokenizer, planted sequences and facts."""

from pathlib import Path

from lightning_kfac.errors import InputError

DEMO = Path(__file__).parent / "demo"
# The demo model after further training: it also knows additions.
DEMO_ARITHMETIC = Path(__file__).parent / "demo_arithmetic"
FOLDERS = {"demo": DEMO, "demo-arithmetic": DEMO_ARITHMETIC}


def resolve_path(path: str | Path) -> Path:
    """Turns ``demo``, ``demo:FILE`` and the same of ``demo-arithmetic`` into a path inside the package.

    Every other path is left alone.

    Example:
        >>> resolve_path("demo:planted_report.jsonl").name
        'planted_report.jsonl'
        >>> resolve_path("demo-arithmetic").name
        'demo_arithmetic'
        >>> str(resolve_path("runs/mine.jsonl"))
        'runs/mine.jsonl'
    """
    demo, colon, name = str(path).partition(":")
    if demo not in FOLDERS:
        return Path(path)
    folder = FOLDERS[demo]
    if not colon:
        return folder
    files = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if name not in files:
        raise InputError(f"{path}: the embedded {demo} has no file {name!r}; it has {', '.join(files)}")
    return folder / name
