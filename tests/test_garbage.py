"""Python's search for garbage, paused and spared."""

import gc
import importlib
import sys

import pytest

from lightning_kfac.garbage import imports, uncollected


def test_a_pause_ends_also_with_an_error():
    with pytest.raises(ZeroDivisionError), uncollected():
        assert not gc.isenabled()
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_a_pause_within_another_ends_with_the_outer_one():
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_only_new_modules_are_spared(tmp_path, monkeypatch):
    """Whatever else lives at that moment would be spared too, so a second call spares nothing."""
    (tmp_path / "spared.py").write_text("things = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    for grows in (True, False):
        before = gc.get_freeze_count()
        with imports():
            importlib.import_module("spared")
        assert (gc.get_freeze_count() > before) == grows
    del sys.modules["spared"]
