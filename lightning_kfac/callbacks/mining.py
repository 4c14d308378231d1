"""MiningWriter: keeps the windows that a model recites, as a memorized set."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.console import console, say
from lightning_kfac.mining.duplicates import entropy_bits, first_of_each
from lightning_kfac.mining.search import Found, Searched
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import origin
from lightning_kfac.modules.text_data import TextData, text_data
from lightning_kfac.storage.files import new_file, timestamp
from lightning_kfac.storage.manifest import remove_ours

# What `predict` writes.
MINED = "memorized.jsonl"
REPETITIONS = "repetitions.jsonl"
SUMMARY = "mining.json"
LOG = "mining"
SEARCHED = (MINED, REPETITIONS, SUMMARY, LOG)


class MiningWriter(Callback):
    """Writes what ``predict`` finds: ``memorized.jsonl``, ``repetitions.jsonl`` and counts in ``mining.json``.

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
        outputs: Searched,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch["batch"] is not None:
            row = {"batch": batch["batch"], **outputs._asdict(), "found": [f._asdict() for f in outputs.found]}
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
        done = list(data.search.log.rows())
        folder = Path(trainer.default_root_dir)
        if left := data.search.n_batches - len(done):
            say(f"{left:,} of {data.search.n_batches:,} batches are not searched yet; the same command goes on")
            return
        found = sorted((Found(**f) for row in done for f in row["found"]), key=lambda f: (f.document, f.offset))
        low = {f for f in range(len(found)) if entropy_bits(found[f].suffix_ids) < data.mining.low_entropy}
        telling = [f for number, f in enumerate(found) if number not in low]
        texts = [[*f.prefix_ids, *f.suffix_ids] for f in telling]
        kept, exact, near = first_of_each(texts, data.mining.near_duplicate)
        _write(folder / REPETITIONS, (found[f] for f in sorted(low)), data)
        counts = {name: sum(row[name] for row in done) for name in ("windows", "checked", "near_ties")}
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
            **counts,
            "recited": len(found),
            "repetitions": len(low),
            "exact_duplicates": exact,
            "near_duplicates": near,
            "kept": len(kept),
            "timestamp": timestamp(),
        }
        with new_file(folder / SUMMARY) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        _write(folder / MINED, (telling[f] for f in kept), data)  # last: it says that the search has finished
        remove_ours(folder / LOG)
        _tell(summary, folder)


def _write(path: Path, rows: Iterable[Found], data: TextData) -> None:
    made_by = {"tokenizer_fingerprint": data.tokenizer_fingerprint}
    with new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
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
    if summary["near_ties"]:
        console.print(f"{summary['near_ties']:,} verdicts hang on logits that are equal within the model's precision.")
