"""Public names of a package that are imported when they are first used."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, names: Mapping[str, Collection[str]], rooms: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package: Its ``__name__``.
        names: By the module that has them.
        rooms: Packages and modules in it that are found without an import of their own.

    Example:
        >>> find, known = lazy("lightning_kfac", {"lightning_kfac.errors": ["InputError"]})
        >>> find("InputError").__name__, "InputError" in known()
        ('InputError', True)
    """
    places = {name: module for module, group in names.items() for name in group}

    def find(name: str) -> Any:
        if name in rooms:
            return import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules[package], name, value)  # found at once the next time
        return value

    def known() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places, *rooms})

    return find, known
