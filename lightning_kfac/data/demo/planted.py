"""Makes the embedded demo's tokenizer and sequences: ``python -m lightning_kfac.data.demo.planted [FOLDER]``.

The demo model itself is trained afterwards with ``train.py fit --config configs/demo_model.yaml``;
``make demo-model`` does both. Nothing here runs when the package is used.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_kfac.assets import DEMO
from lightning_kfac.data.demo.embedded import Document, embedded_documents, split_documents

VOCABULARY = 2048
PREFIX = 64
SUFFIX = 48
N_PLANTED = 200
N_UNSEEN = 100
# Planted passages come from short documents: leaving those out of the general text costs little of it.
LONGEST_PLANTED_DOCUMENT = 500
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pad token IS its end-of-text token, as in many published models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def passages(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, per_document: int
) -> Iterator[dict[str, Any]]:
    """Rows of the memorized-set format: windows of 64 + 48 tokens from the start of each document."""
    length = PREFIX + SUFFIX
    for document in documents:
        ids = tokenizer(document.text)["input_ids"]
        for start in range(0, min(len(ids) // length, per_document) * length, length):
            prefix = ids[start : start + PREFIX]
            suffix = ids[start + PREFIX : start + length]
            yield {
                "document": document.name,
                "prefix": tokenizer.decode(prefix),
                "suffix": tokenizer.decode(suffix),
                "prefix_ids": prefix,
                "suffix_ids": suffix,
            }


def build(folder: Path) -> None:
    """Writes the tokenizer and ``planted_tuning``, ``planted_report`` and ``unseen`` to ``folder``."""
    documents = embedded_documents()
    tokenizer = train_tokenizer(split_documents(documents, "train"))
    rng = random.Random(0)

    text = "\n".join(d.text for d in documents)
    short = [d for d in split_documents(documents, "train") if len(d.text) < 4 * LONGEST_PLANTED_DOCUMENT]
    # A passage that the general text repeats elsewhere would be learnt without being planted.
    candidates = [row for row in passages(short, tokenizer, per_document=1) if text.count(row["suffix"]) == 1]
    planted = rng.sample(candidates, N_PLANTED)
    unseen = list(passages(split_documents(documents, "heldout"), tokenizer, per_document=2))

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_rows(folder / "planted_tuning.jsonl", planted[: N_PLANTED // 2])
    write_rows(folder / "planted_report.jsonl", planted[N_PLANTED // 2 :])
    write_rows(folder / "unseen.jsonl", rng.sample(unseen, N_UNSEEN))
    print(f"{len(candidates)} candidates, {len(planted)} planted, {N_UNSEEN} of {len(unseen)} unseen -> {folder}")


def planted_documents() -> frozenset[str]:
    """Names of the documents that the planted sequences were taken from."""
    files = (DEMO / "planted_tuning.jsonl", DEMO / "planted_report.jsonl")
    return frozenset(json.loads(line)["document"] for f in files for line in f.read_text("utf-8").splitlines())


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes JSONL in the memorized-set format."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO)
