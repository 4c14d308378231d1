"""Makes a second source of memorized text for the demo: ``python -m lightning_kfac.data.demo.codes [FILE]``.

Lines of random codes, which no rule of language helps to recite, unlike the planted passages. The demo model has never
seen them; ``lightning-kfac fit --config demo_sources`` teaches them to a copy of it. Nothing here runs when the package
is used.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_kfac.assets import DEMO
from lightning_kfac.data.demo.planted import PREFIX, SUFFIX, write_rows
from lightning_kfac.models.loading import load_tokenizer

N_CODES = 40
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def code_rows() -> Iterator[dict[str, Any]]:
    """Rows of the memorized-set format, as long as the planted ones: ``K482: 93ae 01f7 77c2 0b5d`` line by line."""
    tokenizer = load_tokenizer("demo")
    rng = random.Random(0)
    for _ in range(N_CODES):
        lines = [f"{rng.choice(LETTERS)}{rng.randrange(1000):03d}: " + _numbers(rng) for _ in range(12)]
        ids = tokenizer("\n".join(lines))["input_ids"][: PREFIX + SUFFIX]
        yield {"prefix_ids": ids[:PREFIX], "suffix_ids": ids[PREFIX:]}


def _numbers(rng: random.Random) -> str:
    return " ".join(f"{rng.randrange(1 << 16):04x}" for _ in range(4))


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO / "planted_codes.jsonl", code_rows())
