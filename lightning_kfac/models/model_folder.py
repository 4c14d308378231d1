"""What a model's folder may hold: files of its own, and nothing that waits for ever or leads elsewhere."""

from pathlib import Path

from lightning_kfac.errors import InputError
from lightning_kfac.storage.special_files import check_not_special

CONFIG = "config.json"
LARGEST_CONFIG = 1 << 24  # bytes
SUBFOLDERS = ("chat_templates", "additional_chat_templates")


def check_model_folder(folder: Path) -> None:
    """Looks at every file of a model, before one is opened.

    Links stay within the folder; those of the hub's cache lead to the blobs of their repository, or to those that all
    repositories share.

    Raises:
        InputError: A pipe, a socket, a device, a link out of the folder, or a config larger than any.
    """
    homes = _homes(folder)
    for path in sorted(path for place in (folder, *(folder / name for name in SUBFOLDERS)) for path in _inside(place)):
        check_not_special(path)
        if path.is_symlink() and not any(_target(path).is_relative_to(home) for home in homes):
            raise InputError(f"{path}: a link out of the model's folder, to {_target(path)}; put the file itself there")
    config = folder / CONFIG
    if config.is_file() and config.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"{config}: too large for a config ({config.stat().st_size:,} bytes)")


def inside(folder: Path, name: str) -> Path:
    """A file of a model's folder; raises ``InputError`` for a name that leads out of it."""
    path = folder / name
    if not _target(path).is_relative_to(folder.resolve()) and not path.is_symlink():
        raise InputError(f"{name}: leads out of the model's folder {folder}; name a file in it")
    return path


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _homes(folder: Path) -> list[Path]:
    """Where links may lead: of HUB/models--ME--NAME/snapshots/COMMIT also to the blobs two and three floors up."""
    home = folder.resolve()
    if home.parent.name != "snapshots" or not home.parents[1].name.startswith("models--"):
        return [home]
    return [home, home.parents[1] / "blobs", home.parents[2] / "blobs"]


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise InputError(f"{path}: cannot be read: {error}") from None
