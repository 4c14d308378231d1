"""MiningWriter: keeps the windows that a model recites, as a memorized set."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.console import console, say
from lightning_kfac.data.names import CORPUS
from lightning_kfac.editing.edited_model import edit_details
from lightning_kfac.math.strips import covered, most_extracted, strips_of
from lightning_kfac.mining.duplicates import entropy_bits, first_of_each
from lightning_kfac.mining.scores import WINDOWS, read_windows, write_windows
from lightning_kfac.mining.search import Found, Looked
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import ModelSource, origin
from lightning_kfac.modules.text_data import TextData, text_data
from lightning_kfac.reporting.figures.strips import strips_figure
from lightning_kfac.storage.files import new_file, timestamp
from lightning_kfac.storage.manifest import remove_ours

# What `predict` writes.
MINED = "memorized.jsonl"
REPETITIONS = "repetitions.jsonl"
SUMMARY = "mining.json"
LOG = "mining"
FIGURE = "windows.png"
SEARCHED = (MINED, REPETITIONS, SUMMARY, WINDOWS, FIGURE, LOG)


class MiningWriter(Callback):
    """Writes what ``predict`` finds: ``memorized.jsonl``, ``repetitions.jsonl`` and counts in ``mining.json``.

    And how likely each window is drawn, whether it is recited or not: ``windows.parquet``, and in ``windows.png`` and
    TensorBoard strips along the documents of which most is extracted.

    Each row holds ``document`` (its number in the corpus), ``offset`` (in tokens of the document), ``match_length``
    (tokens recited behind the prefix), ``entropy_bits`` of the suffix, ids, text, and ``tokenizer_fingerprint``, by
    which the ids are refused with another tokenizer. What is done is logged batch by batch in ``mining/``, so that a
    search that was stopped goes on.
    """

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Looked,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch["batch"] is not None:
            searched = outputs.searched
            row = {"batch": batch["batch"], **searched._asdict(), "found": [f._asdict() for f in searched.found]}
            if outputs.scores is not None:
                row["scores"] = outputs.scores.columns
            text_data(trainer).search.log.append(trainer.global_rank, row)
        if trainer.received_sigterm:  # outside of fit nobody else looks
            raise SIGTERMException

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = text_data(trainer)
        module = causal_lm(pl_module)
        trainer.strategy.barrier("mining")
        fingerprint = weights_fingerprint(module.loaded, ())  # of all ranks, where the model is sharded
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        counts: Counter[str] = Counter()
        found: list[Found] = []
        for row in data.search.log.rows():
            counts.update({name: row[name] for name in ("windows", "checked", "near_ties")}, batches=1)
            found += (Found(**f) for f in row["found"])
        if left := data.search.n_batches - counts.pop("batches", 0):
            say(f"{left:,} of {data.search.n_batches:,} batches are not searched yet; the same command goes on")
            return
        found.sort(key=lambda f: (f.document, f.offset))
        low = {f for f in range(len(found)) if entropy_bits(found[f].suffix_ids) < data.mining.low_entropy}
        telling = [f for number, f in enumerate(found) if number not in low]
        texts = [[*f.prefix_ids, *f.suffix_ids] for f in telling]
        kept, exact, near = first_of_each(texts, data.mining.near_duplicate)
        _write(folder / REPETITIONS, (found[f] for f in sorted(low)), data)
        summary = {
            **origin(module.source),
            "tokenizer_fingerprint": data.tokenizer_fingerprint,
            "corpus": data.corpus.label,
            "max_tokens": data.max_tokens,
            "prefix_len": data.window[0],
            "suffix_len": data.window[1],
            "seq_len": data.seq_len,
            **asdict(data.mining),
            "dtype": str(next(module.loaded.parameters()).dtype).removeprefix("torch."),
            "fingerprint": fingerprint,
            **{name: counts[name] for name in ("windows", "checked", "near_ties")},
            "recited": len(found),
            "repetitions": len(low),
            "exact_duplicates": exact,
            "near_duplicates": near,
            "kept": len(kept),
            "timestamp": timestamp(),
        }
        if module.measures.extraction is not None:
            about = {**summary, **data.about_windows(module.measures.extraction)}
            with new_file(folder / WINDOWS) as path:
                write_windows(path, (row["scores"] for row in data.search.log.in_order()), about)
            _draw(trainer, data, folder)
        with new_file(folder / SUMMARY) as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        _write(folder / MINED, (telling[f] for f in kept), data)  # last: it says that the search has finished
        remove_ours(folder / LOG)
        _tell(summary, folder)
        if data.windows_before is None and (source := ModelSource.recorded(edit_details(module.source))):
            console.print(f"To see what the edit changed, name a search with {source} as --data.mining.before FOLDER.")


def _draw(trainer: Trainer, data: TextData, folder: Path) -> None:
    """Strips along the documents of which most is extracted."""
    text = data.texts.read[CORPUS]
    sizes = np.diff(text.ends, prepend=0) - 1  # the end of text is no part of a document
    stages = {"": partial(read_windows, folder / WINDOWS)}
    if data.windows_before is not None:
        stages = {"earlier": partial(read_windows, data.windows_before), "this model": stages[""]}
    chosen = most_extracted((read() for read in stages.values()), len(sizes))
    strips = covered(strips_of({n: (f"document {n}", int(sizes[n])) for n in chosen}, stages, *data.window))
    if not strips:
        return
    figure = strips_figure(strips)
    with new_file(folder / FIGURE) as path:
        figure.savefig(path, format="png", dpi=120)
    if isinstance(trainer.logger, TensorBoardLogger):
        trainer.logger.experiment.add_figure("mining/where documents come out", figure)


def _write(path: Path, rows: Iterable[Found], data: TextData) -> None:
    made_by = {"tokenizer_fingerprint": data.tokenizer_fingerprint}
    with new_file(path) as place, open(place, "w", encoding="utf-8") as file:
        for f in rows:
            text = {"prefix": data.decode(f.prefix_ids), "suffix": data.decode(f.suffix_ids)}
            entropy = {"entropy_bits": round(entropy_bits(f.suffix_ids), 3)}
            file.write(json.dumps({**f._asdict(), **entropy, **text, **made_by}, ensure_ascii=False) + "\n")


def _tell(summary: dict[str, Any], folder: Path) -> None:
    console.print(
        f"{summary['windows']:,} windows looked at, {summary['checked']:,} checked by themselves, "
        f"{summary['recited']:,} recited word for word: {summary['repetitions']:,} mere repetitions, "
        f"{summary['exact_duplicates']:,} duplicates, {summary['near_duplicates']:,} near-duplicates, "
        f"{summary['kept']:,} kept -> {folder / MINED}"
    )
    if summary["bulk_share"] is not None:
        console.print(
            f"Only windows of whose suffix {summary['bulk_share']:.0%} or more lie in flat directions were checked; "
            "without --data.mining.bulk_share those that one long forward predicts are."
        )
    elif not summary["exhaustive"]:
        console.print(
            f"Only windows of whose suffix one long forward predicts {summary['likely']:.0%} were checked; "
            "--data.mining.exhaustive true checks all."
        )
    if (folder / WINDOWS).is_file():
        console.print(f"How likely each window is drawn: {folder / WINDOWS}, along the documents: {folder / FIGURE}")
    if summary["near_ties"]:
        console.print(f"{summary['near_ties']:,} verdicts hang on logits that are equal within the model's precision.")
