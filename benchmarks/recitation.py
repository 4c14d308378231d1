"""Strict recitation decided by one forward, beside batched ``generate``, and beside extraction from the same forward.

    OMP_NUM_THREADS=1 python -m benchmarks.recitation [--device cuda] [--output benchmarks/results/recitation.json]

500 sequences of 64 + 48 tokens, 64 a batch, interleaved, medians of five. Of the demo: its planted passages (all
recited) and unseen ones (all diverge early), each repeated to 500, and 200 of which a third is recited, a third is but
for one token anywhere behind the first, and a third is not. Of a larger model with random weights: 128 sequences that
it wrote itself, and the same with another first token of the suffix. All verdicts are compared. Ratios are medians over
the turns, of the process's CPU seconds and of the clock's (on a GPU the latter count).
``extraction_beside_strict``: verdicts with log p (temperature 1, top-k 40) over verdicts alone; CPU seconds on a CPU,
the two in turn for each batch, median of seven.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.evaluation.decoding import greedy_continuations
from lightning_kfac.evaluation.recitation import Recitation, recite
from lightning_kfac.metrics.functional import Decoding
from lightning_kfac.models.loading import load_model

PREFIX, SUFFIX, COUNT, LARGER_COUNT, BATCH, REPEATS = 64, 48, 500, 128, 64, 5
LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
LARGEST = {  # OLMo-2 1B, for a GPU
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "vocab_size": 100352,
}


def by_generate(model: nn.Module, prefixes: torch.Tensor, golds: torch.Tensor) -> list[bool]:
    """The usual way."""
    out = model.generate(
        prefixes,
        attention_mask=torch.ones_like(prefixes),
        do_sample=False,
        max_new_tokens=SUFFIX,
        min_new_tokens=SUFFIX,
        pad_token_id=0,
    )
    return (out[:, PREFIX:] == golds).all(1).tolist()


def compare(model: nn.Module, sequences: torch.Tensor) -> dict:
    """Seconds of each way for all sequences. int64 [n, PREFIX + SUFFIX]."""
    device = next(model.parameters()).device
    batches = [part.to(device) for part in sequences.split(BATCH)]

    def generate() -> list[bool]:
        return [v for b in batches for v in by_generate(model, b[:, :PREFIX], b[:, PREFIX:])]

    def strict() -> list[bool]:
        parts = [recite(model, b[:, :PREFIX].tolist(), b[:, PREFIX:].tolist(), decode=False) for b in batches]
        return [recital.strict for part in parts for recital in part]

    def with_continuations() -> list[bool]:
        recitation = Recitation(model)
        parts = [recitation.add(b[:, :PREFIX].tolist(), b[:, PREFIX:].tolist()) for b in batches]
        return [recital.strict for part in (*parts, recitation.finish()) for batch in part for recital in batch]

    ways = {"generate": generate, "strict": strict, "with_continuations": with_continuations}
    verdicts, times = {}, {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(REPEATS):
            for name, way in ways.items():
                begin = time.process_time(), time.perf_counter()
                verdicts[name] = way()
                times[name].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    if len({tuple(v) for v in verdicts.values()}) > 1:
        raise SystemExit("the verdicts differ")
    found = {"recited": sum(verdicts["strict"])}
    for number, clock in enumerate(("cpu", "wall")):
        of_clock = {name: [pair[number] for pair in pairs] for name, pairs in times.items()}
        found[f"{clock}_seconds"] = {name: statistics.median(t) for name, t in of_clock.items()}
        for name in ("strict", "with_continuations"):
            ratios = [g / t for g, t in zip(of_clock["generate"], of_clock[name], strict=True)]
            found[f"{name}_times_faster_{clock}"] = statistics.median(ratios)
    return found | beside(model, sequences)


def beside(model: nn.Module, sequences: torch.Tensor, repeats: int = 7) -> dict:
    """What extraction adds to verdicts. int64 [n, PREFIX + SUFFIX]."""
    clock = time.perf_counter if next(model.parameters()).is_cuda else time.process_time
    pairs = [
        ([r[:PREFIX] for r in b], [r[PREFIX:] for r in b]) for b in map(torch.Tensor.tolist, sequences.split(BATCH))
    ]
    found = []
    for turn in range(repeats):
        spent = {None: 0.0, Decoding(): 0.0}
        for number, pair in enumerate(pairs):
            for decoding in list(spent)[:: 1 if (turn + number) % 2 else -1]:
                begin = clock()
                recite(model, *pair, decode=False, decoding=decoding)
                spent[decoding] += clock() - begin
        found.append(spent[Decoding()] / spent[None])
    return {"extraction_beside_strict": statistics.median(found)}


def demo_sequences(name: str) -> torch.Tensor:
    """Of an embedded set, repeated to 500."""
    rows = torch.tensor([[*s.prefix, *s.suffix] for s in load_memorized(f"demo:{name}.jsonl", None, 2048)])
    return rows.repeat(5, 1)[:COUNT]


def mixed_sequences() -> torch.Tensor:
    """200 of the demo in random order: recited, recited but for one token, not recited."""
    recited, unseen = demo_sequences("planted_report")[:200], demo_sequences("unseen")[:200]
    rng = random.Random(0)
    nearly = recited[66:133].clone()
    for row in nearly:
        place = PREFIX + rng.randrange(1, SUFFIX)
        row[place] = (row[place] + 7) % 2048
    rows = torch.cat([recited[:66], nearly, unseen[133:200]])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def own_sequences(model: nn.Module) -> torch.Tensor:
    """Prefixes at random, continued by the model itself."""
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randint(1, model.config.vocab_size, (LARGER_COUNT, PREFIX), generator=generator).tolist()
    parts = [prefixes[i : i + BATCH] for i in range(0, LARGER_COUNT, BATCH)]
    suffixes = [row for part in parts for row in greedy_continuations(model, part, [SUFFIX] * len(part))]
    return torch.tensor([[*p, *s] for p, s in zip(prefixes, suffixes, strict=True)])


def random_model(settings: dict, device: str) -> nn.Module:
    """OLMo-2 architecture, weights at random, bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", **settings, eos_token_id=None, pad_token_id=0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    demo = load_model("demo", "float32").to(options.device)
    larger = random_model(LARGEST if options.device == "cuda" else LARGER, options.device)
    own = own_sequences(larger)
    early = own.clone()
    early[:, PREFIX] = (early[:, PREFIX] + 1) % larger.config.vocab_size
    rows = {
        "demo, all recited": compare(demo, demo_sequences("planted_report")),
        "demo, none recited": compare(demo, demo_sequences("unseen")),
        "demo, a third recited, a third nearly": compare(demo, mixed_sequences()),
        "larger, all recited": compare(larger, own),
        "larger, diverging at once": compare(larger, early),
    }
    for name, row in rows.items():
        print(
            f"{name}: generate {row['cpu_seconds']['generate']:.2f} CPU s; strict {row['strict_times_faster_cpu']:.2f} "
            f"times faster (wall {row['strict_times_faster_wall']:.2f}), with continuations "
            f"{row['with_continuations_times_faster_cpu']:.2f} ({row['with_continuations_times_faster_wall']:.2f}); "
            f"{row['recited']} recited; "
            f"extraction beside strict {row['extraction_beside_strict']:.3f}"
        )
    if options.output:
        options.output.write_text(json.dumps({"device": options.device, "torch": torch.__version__, **rows}, indent=2))


if __name__ == "__main__":
    main()
