"""Fixtures of runs in processes."""

import json
import random

import pytest

from lightning_kfac.assets import DEMO
from tests.callbacks.collection.common import options, outcome

WORDS = [f"{a}{b}" for a in ("loss", "rank", "basis", "token", "gate") for b in ("", "s", "ed", "ing", "er")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A corpus, a held-out text and a few memorized sequences."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name in ("corpus", "heldout"):
        lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=30))}) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    planted = (DEMO / "planted_report.jsonl").read_text().splitlines()[:3]
    (folder / "few.jsonl").write_text("\n".join(planted) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(forks, texts, tmp_path_factory):
    """A run that nothing interrupts: its outcome, and how much work on files it does."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    count = folder.parent / "count"
    code, said = forks.run(options(texts, folder), folder.parent / "log", watched=str(folder), count_to=str(count))
    assert code == 0, said
    return outcome(folder), int(count.read_text()), folder
