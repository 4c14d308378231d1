"""Edits that are measured once: results on disk, by what they depend on."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from lightning_kfac.console import counted, progress_console, track_count
from lightning_kfac.editing import sweep
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import origin
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.storage.results import append_result, read_results


class MeasuredPoints:
    """Measures edits that are not in a results file yet.

    Args:
        editor: Applies the edits.
        evaluator: Measures the model.
        results: The JSONL file.
        factors, domains: What the edits are made with.
        options: ``dtype`` and ``precision``, on which figures depend too.

    Attributes:
        rows: Results by key.
        baseline: Key of the unedited model's.

    Raises:
        InputError: The file holds something else.
    """

    def __init__(
        self,
        editor: KFACEditor,
        evaluator: ModelEvaluator,
        results: Path,
        factors: FactorFolder,
        domains: Mapping[str, FactorFolder],
        options: Namespace,
    ):
        self.editor = editor
        self.evaluator = evaluator
        self.results = results
        # Everything that a figure depends on, but for the device.
        read = {name: folder.content() for name, folder in {"": factors, **domains}.items()}
        weights = weights_fingerprint(editor.model, factors)
        self._context = weights, sorted(read.items()), evaluator.data.measured(), options.dtype, options.precision
        self.rows: dict[str | None, dict[str, Any]] = {row.get("point"): row for row in read_results(results)}
        if None in self.rows:
            raise InputError(f"{results} holds results of something else; choose another --output")
        self.baseline = sweep.point_key(EditConfig(), "baseline", *self._context)

    def key(self, config: EditConfig) -> str:
        """Identifies an edit and what its figures depend on."""
        return sweep.point_key(config, *self._context)

    def measure(self, configs: Sequence[EditConfig], what: str) -> list[dict[str, Any]]:
        """Results of the unedited model and of each edit, from the file or measured now.

        Args:
            what: Names the work in the progress display.
        """
        missing = {self.key(config): config for config in configs if self.key(config) not in self.rows}
        if missing or self.baseline not in self.rows:
            self._measure(missing, what)
        return [self.rows[self.baseline], *(self.rows[self.key(config)] for config in configs)]

    def _measure(self, missing: dict[str, EditConfig], what: str) -> None:
        self.evaluator.module.stage = "baseline"  # nDCG and differences need it in every process
        self._keep(self.baseline, "baseline", {"edit": None, **self.evaluator(self.editor.model)})
        self.evaluator.module.stage = "edited"
        evaluating = 0.0

        def evaluate(model: nn.Module) -> dict[str, Any]:
            nonlocal evaluating
            begin = time.monotonic()
            figures = self.evaluator(model)
            evaluating += time.monotonic() - begin
            return figures

        begin = time.monotonic()
        with track_count(what, "edits", total=len(missing)) as advance_to:
            rows = sweep.run(self.editor, missing.values(), evaluate)
            for number, (key, row) in enumerate(zip(missing, rows, strict=True), start=1):
                self._keep(key, "edited", row)
                advance_to(number)
        total = time.monotonic() - begin
        progress_console.print(
            f"{counted(len(missing), 'edit')}: {total - evaluating:.1f} s editing, {evaluating:.1f} s measuring"
        )

    def _keep(self, key: str, stage: str, row: dict[str, Any]) -> None:
        row = {"stage": stage, "point": key, "context": self.baseline, **row}
        row |= origin(self.evaluator.module.source)
        row["tokenizer_fingerprint"] = self.evaluator.data.tokenizer_fingerprint
        self.rows[key] = append_result(self.results, row)
