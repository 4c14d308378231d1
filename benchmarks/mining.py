"""Mining at stride 16: seconds a window beside generating it, and the recall of the long forward.

    OMP_NUM_THREADS=1 python -m benchmarks.mining [--output benchmarks/results/mining.json]

The demo model. Rates: medians of five, interleaved, on the embedded documents (most of them short) and on the same
joined to long ones; the process's CPU seconds and the clock's, and their ratios, each the median over the turns.
Recall: of the windows that checking every window finds, how many the long forward finds too, on all planted documents
and 300 others; once as they are, once with 0 to 304 tokens of other text before each planted one.
"""

import argparse
import json
import random
import statistics
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_kfac.data.demo.embedded import embedded_documents
from lightning_kfac.data.demo.planted import planted_documents
from lightning_kfac.data.tokenized import TokenizedText
from lightning_kfac.mining.search import Searched, search
from lightning_kfac.mining.windows import Mining, MiningPieces, Piece
from lightning_kfac.models.loading import load_model, load_tokenizer

PREFIX, SUFFIX, SEQ_LEN, ROWS, BATCH, REPEATS = 64, 48, 1024, 16, 64, 5


def text_of(documents: list[list[int]]) -> TokenizedText:
    """Documents with their end-of-text tokens."""
    tokens = np.concatenate([[*ids, 0] for ids in documents]).astype(np.int32)
    return TokenizedText(tokens, np.cumsum([len(ids) + 1 for ids in documents]))


def mine(model: nn.Module, pieces: list[Piece], exhaustive: bool = False) -> list[Searched]:
    """As ``train.py predict`` does."""
    likely = None if exhaustive else Mining().likely
    options = {"batch_size": BATCH, "end_of_text": {0}, "max_positions": 1024}
    groups = [pieces[i : i + ROWS] for i in range(0, len(pieces), ROWS)]
    return [search(model, group, PREFIX, SUFFIX, likely=likely, **options) for group in groups]


def generate(model: nn.Module, pieces: list[Piece], count: int) -> None:
    """The usual way, for so many windows."""
    windows = [p.tokens[o : o + PREFIX] for p in pieces for o in p.offsets][:count]
    for i in range(0, count, BATCH):
        prefixes = torch.from_numpy(np.stack(windows[i : i + BATCH]).astype(np.int64))
        model.generate(
            prefixes, attention_mask=torch.ones_like(prefixes), do_sample=False, max_new_tokens=SUFFIX, pad_token_id=0
        )


def rates(model: nn.Module, documents: list[list[int]]) -> dict:
    """Windows a second of each way."""
    pieces = list(MiningPieces(text_of(documents), PREFIX + SUFFIX, 16, SEQ_LEN))
    random.Random(0).shuffle(pieces)
    pieces = sorted(pieces[: 4 * ROWS], key=lambda piece: -len(piece.tokens))
    windows, some = sum(len(piece.offsets) for piece in pieces), pieces[::4]
    times: dict[str, list[tuple[float, float]]] = {"long forward": [], "every window": [], "generate": []}
    generated = min(2 * BATCH, windows)
    for _ in range(REPEATS):
        for name, way, n in (
            ("long forward", lambda: mine(model, pieces), windows),
            ("generate", lambda: generate(model, pieces, generated), generated),
            (
                "every window",
                lambda: mine(model, some, exhaustive=True),
                sum(len(p.offsets) for p in some),
            ),
        ):
            begin = time.process_time(), time.perf_counter()
            way()
            times[name].append(((time.process_time() - begin[0]) / n, (time.perf_counter() - begin[1]) / n))
    found: dict = {"windows": windows}
    for number, clock in enumerate(("cpu", "wall")):
        of_clock = {name: [pair[number] for pair in pairs] for name, pairs in times.items()}
        found[f"windows_per_{clock}_s"] = {name: 1 / statistics.median(t) for name, t in of_clock.items()}
        found[f"times_faster_{clock}"] = {
            name: statistics.median(g / t for g, t in zip(of_clock["generate"], of_clock[name], strict=True))
            for name in ("long forward", "every window")
        }
    return found


def recall(model: nn.Module, documents: list[list[int]]) -> dict:
    """What the long forward finds of what there is."""
    pieces = list(MiningPieces(text_of(documents), PREFIX + SUFFIX, 16, SEQ_LEN))
    every = {(f.document, f.offset) for s in mine(model, pieces, exhaustive=True) for f in s.found}
    quick = mine(model, pieces)
    found = {(f.document, f.offset) for s in quick for f in s.found}
    windows = sum(s.windows for s in quick)
    checked = sum(s.checked for s in quick) / windows
    return {"windows": windows, "recited": len(every), "recall": len(found & every) / len(every), "checked": checked}


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model("demo", "float32"), load_tokenizer("demo")
    names, every = planted_documents(), embedded_documents()
    planted = [tokenizer(d.text)["input_ids"] for d in every if d.name in names]
    others = [tokenizer(d.text)["input_ids"] for d in every if d.name not in names]
    random.Random(0).shuffle(others)
    long = [list(chain(*others[i : i + 20])) for i in range(0, len(others), 20)]
    before, rng = list(chain(*others[300:400])), random.Random(1)
    # Multiples of the stride, so that passages stay at its multiples.
    anywhere = [before[start : start + 16 * rng.randrange(20)] for start in rng.choices(range(10_000), k=len(planted))]
    found = {
        "short documents": rates(model, others),
        "long documents": rates(model, long),
        "documents as they are": recall(model, planted + others[:300]),
        "other text before each": recall(model, [a + b for a, b in zip(anywhere, planted, strict=True)] + others[:300]),
    }
    for name, row in found.items():
        print(f"{name}: {json.dumps(row)}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
