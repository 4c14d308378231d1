"""Makes the fact files of the arithmetic demo: ``python -m lightning_kfac.data.demo.arithmetic [FOLDER]``.

The facts are a domain that a model can be asked about, so that an edit which protects the domain's
curvature can be compared with one that does not. The model itself is trained afterwards with
``train.py fit --config configs/demo_arithmetic.yaml``; ``make demo-arithmetic`` does both.
"""

import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_kfac.assets import DEMO, DEMO_ARITHMETIC
from lightning_kfac.data.demo.planted import PREFIX, SUFFIX, write_rows
from lightning_kfac.models.loading import load_tokenizer

LARGEST = 19
ROW_TOKENS = PREFIX + SUFFIX  # as long as the planted sequences
# How often the training file holds each fact, by itself and in a row of many; a training repeats the file.
PASSES_ALONE = 6
PASSES_PACKED = 3


def facts() -> list[dict[str, str]]:
    """All additions of two numbers from 0 to ``LARGEST``, shuffled."""
    numbers = range(LARGEST + 1)
    rows = [
        {"prompt": f"{a} + {b} =", "answer": f"{a + b}", "text": f"{a} + {b} = {a + b}"}
        for a, b in itertools.product(numbers, numbers)
    ]
    random.Random(0).shuffle(rows)
    return rows


def training_rows(
    rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, list[int]]]:
    """Rows of the memorized-set format: single facts, and rows of as many facts as fit, each followed by EOS.

    Single facts are what a bare prompt asks for, and are learnt several times faster than packed ones.
    Packed facts are what a collection reads: without them the model would not know its facts there,
    and the domain's curvature would say little about them.
    """
    rng = random.Random(1)
    tokens = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    for _ in range(PASSES_ALONE):
        yield from map(_halves, rng.sample(tokens, len(tokens)))
    for _ in range(PASSES_PACKED):
        packed: list[int] = []
        for ids in rng.sample(tokens, len(tokens)):
            if len(packed) + len(ids) > ROW_TOKENS:
                yield _halves(packed)
                packed = []
            packed += ids
        yield _halves(packed)


def _halves(row: list[int]) -> dict[str, list[int]]:
    return {"prefix_ids": row[: len(row) // 2], "suffix_ids": row[len(row) // 2 :]}


def build(folder: Path) -> None:
    """Writes ``facts_protected``, ``facts_other`` (half of the facts each) and ``facts_training``."""
    rows = facts()
    half = len(rows) // 2
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "facts_protected.jsonl", rows[:half])
    write_rows(folder / "facts_other.jsonl", rows[half:])
    write_rows(folder / "facts_training.jsonl", list(training_rows(rows, load_tokenizer(str(DEMO)))))
    print(f"{len(rows)} facts -> {folder}")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_ARITHMETIC)
