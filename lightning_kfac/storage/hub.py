"""Factors and patches on the Hugging Face hub."""

import re
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub

from lightning_kfac.errors import InputError, first_line
from lightning_kfac.storage.manifest import MANIFEST
from lightning_kfac.storage.run_folder import EDIT_FILE

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Bases can be computed again and are large; half-written files belong to nobody else.
NOT_PUSHED = ["*.part*", MANIFEST, "bases/*"]


def local_folder(name: str | Path) -> Path:
    """A folder that is here, or a hub repository brought here.

    Args:
        name: A path, or ``user/repository`` where no such path exists.

    Raises:
        InputError: The repository does not exist or cannot be reached.
    """
    path = Path(name)
    if path.exists() or not REPOSITORY.fullmatch(str(name)) or path.parent.exists():
        return path
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the hub, of its validation, of whatever carries the connection
        raise InputError(
            f"{name}: neither a folder here nor a repository that the hub gives: {first_line(error)}"
        ) from None


def check_reachable(what: Literal["model", "dataset"], name: str) -> None:
    """Raises ``InputError`` at once where the hub cannot be reached: its client tries for a minute.

    Args:
        what: Kind of repository.
        name: Of the repository. One of which something is in the hub's cache is left to the client.
    """
    constants = huggingface_hub.constants
    known = Path(constants.HF_HUB_CACHE) / f"{what}s--{name.replace('/', '--')}"
    if known.exists():
        return
    absent = f"{what} {name}: neither a folder here nor in the hub's cache, and {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{absent} must not be asked (HF_HUB_OFFLINE)")
    address = urlsplit(constants.ENDPOINT)
    if getproxies().get(address.scheme):
        return
    try:
        socket.getaddrinfo(address.hostname, address.port or address.scheme)
    except OSError as error:
        raise InputError(f"{absent} cannot be reached ({error.strerror or error})") from None


def push_folder(path: str | Path, repository: str, private: bool = True) -> str:
    """Uploads a factor folder, an edited model or a patch to a hub repository, which is made if it does not exist.

    Args:
        path: The folder.
        repository: ``user/name``.
        private: Of a new repository.

    Returns:
        Its address.

    Raises:
        InputError: The folder holds neither factors nor an edited model or patch, or the hub refuses.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("metadata.json", EDIT_FILE)):
        raise InputError(f"{path}: neither a factor folder nor an edited model or patch")
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is not a repository name such as user/name")
    skipped = NOT_PUSHED[:2] if (path / "moments").is_dir() else NOT_PUSHED  # moments need the very bases
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=path, ignore_patterns=skipped)
    except Exception as error:
        raise InputError(f"{repository}: the hub refuses: {first_line(error)}") from None
    return str(address)
