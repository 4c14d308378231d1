"""Where a model comes from: its name, and what else decides which weights that means."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_kfac.assets import resolve_path
from lightning_kfac.console import say
from lightning_kfac.errors import InputError

# What factors of a model without a name say.
NAMELESS = "random weights"
# Folders above one in which a model that moved with it is looked for.
LEVELS = 3


@dataclass(frozen=True)
class ModelSource:
    """A stored model.

    Args:
        name: Hub name, local folder, or ``demo``.
        revision: Branch, tag or commit of a hub repository.
        gguf_file: Name of a GGUF file in the folder or repository, which holds the weights.
        adapter: Folder or hub name of an adapter (peft) that is merged into the weights.
        trust_remote_code: Let the model's repository run its own code.

    Example:
        >>> ModelSource.named("EleutherAI/pythia-70m@step3000")
        ModelSource(name='EleutherAI/pythia-70m', revision='step3000', gguf_file=None, adapter=None, \
trust_remote_code=False)
        >>> str(ModelSource("EleutherAI/pythia-70m", revision="step3000"))
        'EleutherAI/pythia-70m@step3000'
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def named(
        cls,
        name: "str | ModelSource",
        revision: str | None = None,
        gguf_file: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> "ModelSource":
        """A source from what a user says; ``NAME@REVISION`` is short for a hub name with its revision.

        Raises:
            InputError: Two revisions, or one of a local folder.
        """
        if isinstance(name, ModelSource):
            return name
        if not resolve_path(name).exists() and "@" in name:
            name, _, written = name.rpartition("@")
            if revision not in (None, written):
                raise InputError(f"model {name}: two revisions, {written} and {revision}; give one")
            revision = written
        if revision is not None and resolve_path(name).exists():
            raise InputError(f"model {name} is a local path, which has no revision {revision}: leave the revision out")
        return cls(name, revision, gguf_file, adapter, trust_remote_code)

    @classmethod
    def recorded(cls, about: Mapping[str, Any], trust_remote_code: bool = False) -> "ModelSource | None":
        """What ``about`` once said, as metadata, ``edit.json`` or a result keep it; None where no model is named."""
        name = about.get("model")
        if not isinstance(name, str) or name == NAMELESS:
            return None
        return cls(name, about.get("revision"), about.get("gguf_file"), about.get("adapter"), trust_remote_code)

    def about(self) -> dict[str, str]:
        """For metadata: the model, and of the rest what is set."""
        found = {"model": self.name, "revision": self.revision, "gguf_file": self.gguf_file, "adapter": self.adapter}
        return {key: value for key, value in found.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of a ``CausalLM``."""
        return {"model_name" if key == "name" else key: value for key, value in vars(self).items()}

    @property
    def path(self) -> Path:
        """The folder, of a model that is local."""
        return resolve_path(self.name)

    @property
    def is_plain(self) -> bool:
        """Whether the weights are those of the folder or repository as they are."""
        return self.gguf_file is None and self.adapter is None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def origin(source: ModelSource | None) -> dict[str, str | None]:
    """What results and metadata say of a model that may have no name."""
    return {"model": None} if source is None else dict(source.about())


def found_again(about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a file in a folder says of its model, with the path that the model has today, if both moved together.

    Args:
        about: As ``edit.json`` keeps it.
        folder: Where that lies. The end of the model's path is looked for in it and in the folders above it; of a name
            that may be one of the hub, the whole.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()).resolve()
        >>> (place / "base").mkdir() or (place / "base" / "config.json").write_text("{}")
        2
        >>> found_again({"model": "/long/gone/base"}, place / "edited")["model"] == str(place / "base")
        True
        >>> found_again({"model": "user/base"}, place / "edited")["model"]
        'user/base'
    """
    name = about.get("model")
    if not isinstance(name, str) or name == NAMELESS or resolve_path(name).exists():
        return about
    found = _moved(name, folder.resolve())
    if found is None:
        return about
    _say_once(f"{name} is not there; {found} is taken for it")
    return {**about, "model": found}


_say_once = cache(say)  # a command asks several times


def _moved(name: str, folder: Path) -> str | None:
    """Where the end of a path lies today."""
    parts = Path(name).parts
    first = 1 if Path(name).is_absolute() else 0
    ends = [Path(*parts[start:]) for start in range(first, len(parts) if len(parts) > 2 else 1)]
    for end in ends:
        for above in (folder, *folder.parents[:LEVELS]):
            if (above / end / "config.json").is_file():
                return str(above / end)
    return None
