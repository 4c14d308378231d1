"""What a training may see: a half of the set, text, or another set, without what is measured."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kfac.attacks.relearning import HALF, TEXT
from lightning_kfac.console import say
from lightning_kfac.data.halves import GIVEN_AWAY, Halves, giving_away, seeded_halves, write_sequences
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.names import CORPUS, MEMORIZED
from lightning_kfac.data.set_formats import MemorizedSet
from lightning_kfac.errors import InputError
from lightning_kfac.models.language import most_positions
from lightning_kfac.models.loading import load_config
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.text_data import TextData

RELEARNING = "attacks: relearning"


def in_halves(model: ModelSource, settings: dict[str, Any], seed: int, folder: Path) -> tuple[Halves, TextData]:
    """Both halves of the memorized set, written as files, and the data with the one that is measured.

    Args:
        model: Whose tokenizer reads it.
        settings: Of ``TextData``, with a memorized set.
        seed: Decides which sequences go where.
        folder: For the files.
    """
    memorized = MemorizedSet.parse(MEMORIZED, settings["memorized"])
    if memorized.files()[0].resolve().is_relative_to(folder.resolve()):
        raise InputError(f"data.memorized {memorized.source} is a half that this would write; name the whole set")
    whole = TextData(**settings)
    whole.read_as(model)
    config = load_config(model).get_text_config()
    whole.check(config.vocab_size, most_positions(config))
    halves = seeded_halves(whole.sequences(MEMORIZED), seed, memorized.source)
    for name, sequences in halves._asdict().items():
        write_sequences(sequences, folder / f"{name}.jsonl")
    return halves, TextData(**settings | {"memorized": str(folder / "reported.jsonl")})


def to_learn(
    source: str, halves: Halves, data: TextData, model: ModelSource, folder: Path, what: str = RELEARNING
) -> list[MemorizedSequence]:
    """Sequences to learn; those that give away what is measured are left out, with a notice.

    Args:
        source: ``half``, ``text`` or a file.
        halves: Of the memorized set.
        data: Whose corpus is the text.
        model: That learns.
        folder: For tokenized text.
        what: Learns it, for messages.

    Raises:
        InputError: Nothing is left, or a sequence is longer than the model takes.
    """
    found = _sequences(source, halves, data, model, folder)
    left_out = set(giving_away(found, halves.reported))
    kept = [sequence for number, sequence in enumerate(found) if number not in left_out]
    if not kept:
        raise InputError(f"{what}: {source} holds nothing to learn that is not measured", what.partition(":")[0])
    if left_out:
        say(
            f"{what}: {len(left_out):,} of {len(found):,} sequences of {source} hold {GIVEN_AWAY} tokens "
            "in a row of a suffix that is measured: left out"
        )
    return kept


def content_of_sequences(sequences: Sequence[MemorizedSequence]) -> str:
    """Identifies what is learned."""
    rows = [[list(map(int, s.prefix)), list(map(int, s.suffix))] for s in sequences]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _sequences(
    source: str, halves: Halves, data: TextData, model: ModelSource, folder: Path
) -> list[MemorizedSequence]:
    if source == HALF:
        return halves.shown
    config = load_config(model).get_text_config()
    if source == TEXT:
        data.texts.tokenize(folder / "data", "predict", data.tokenizer, config.vocab_size)
        rows = data.texts.rows(CORPUS)
        return [MemorizedSequence([], ids.tolist()) for _, ids in (rows[i] for i in range(len(rows))) if len(ids) > 1]
    sets = data.sets
    found = load_memorized(
        source, data.tokenizer, config.vocab_size, prefix_len=sets.prefix_len, suffix_len=sets.suffix_len
    )
    longest = max(len(sequence.prefix) + len(sequence.suffix) for sequence in found)
    most = most_positions(config)
    if most is not None and longest > most:
        raise InputError(f"{source}: a sequence of {longest} tokens, but the model takes at most {most} positions")
    return found
