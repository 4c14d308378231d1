"""EditCallback: edits the model when the collection has ended, saves it, and has it evaluated again."""

from dataclasses import replace
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_kfac.callbacks.collection.collector import CurvatureCollector, find_collector
from lightning_kfac.callbacks.collection.task import TaskModule, task_of
from lightning_kfac.callbacks.typed import data_module
from lightning_kfac.data.names import CORPUS
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.editing.checks import check_alpha, check_formula, named_in_layers
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import Save, save_edited
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.editing.report import EditReport
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import ModelSource


class EditCallback(Callback):
    """Applies a curvature edit at the end of ``fit``.

    Where domains were collected too, the edit without them is made and evaluated first (stage ``general``) and
    taken back; then the one with them (stage ``union``), which stays.

    Args:
        config: What to edit and how.
        save: Write the edited model as a ``full`` checkpoint or as a ``patch`` of its source, or ``none``.

    Attributes:
        reports: What each edit did, by stage.
        report: What the last one did.

    Example:
        >>> import tempfile, lightning
        >>> from lightning_kfac.callbacks import CurvatureCollector
        >>> from lightning_kfac.modules.text_data import TextData
        >>> from lightning_kfac.modules import CausalLM
        >>> collector = CurvatureCollector(blocks=[3], projections=["up"])
        >>> edit = EditCallback(EditConfig(rho=0.8))
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, callbacks=[collector, edit], default_root_dir=tempfile.mkdtemp(), accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> data = TextData(max_tokens=500, seq_len=100, tokenizer="demo")
        >>> trainer.fit(CausalLM("demo"), data)
        >>> edit.report.layers[0].mass_kept >= 0.8
        True
    """

    def __init__(self, config: EditConfig, save: Save = "full"):
        self.config = config
        self.save = save
        self.reports: dict[str, EditReport] = {}

    @property
    def report(self) -> EditReport | None:
        """What the last edit did; None before it."""
        return next(reversed(self.reports.values()), None)

    def check(self, targets: list[str], domains: list[str], collector: CurvatureCollector) -> None:
        """Raises ``InputError`` for an edit that the collection cannot serve.

        Args:
            targets: Names of the layers that are collected and chosen by blocks and projections.
            domains: Names of the domains.
            collector: What collects.
        """
        check_alpha(self.config, domains)
        for domain in domains:
            self.config.alpha_of(domain)
        there = {"moments": collector.moments is not None, "coupled": collector.coupled}
        for name in named_in_layers(self.config, targets):
            check_formula(self.config.for_layer(name), bool(domains), [need for need in there if there[need]])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            find_collector(trainer, self)  # callbacks work in their order

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector = find_collector(trainer, self)
        task = task_of(pl_module)
        data = data_module(trainer)
        if trainer.enable_validation and not (task.results or task.skip_baseline):
            # The fit was cut short: no baseline yet.
            trainer.fit_loop.epoch_loop.val_loop.run()
        domains = getattr(data, "domains", {})
        if unread := [name for name in domains if name not in collector.domain_factors]:
            raise InputError(
                f"the collection ended before the domain {unread[0]} was read; the factors so far are saved"
            )
        moments = dict(collector.moments_of)
        editor = KFACEditor(
            task.model,
            collector.factors,
            self.config,
            domains=collector.domain_factors,
            moments=moments.pop(CORPUS, None),
            domain_moments=moments,
            bases=collector.bases,
            ranks=current_ranks(),
            owners=collector.owners,
        )
        task.edited_layers = list(editor.layers)
        fingerprint = weights_fingerprint(task.model, editor.layers)
        if collector.domain_factors:
            plain = replace(self.config, mix="scores", basis=None, alpha=0.0)
            self.reports["general"] = editor.apply(plain)
            self._evaluate("general", trainer, task)
            editor.restore()
        stage = "union" if collector.domain_factors else "edited"
        report = editor.apply()
        self.reports[stage] = report
        with editor.ranks.together():
            save_edited(
                task.model,
                getattr(data, "tokenizer", None),
                Path(trainer.default_root_dir) / ("patch" if self.save == "patch" else "edited"),
                report,
                source=ModelSource.recorded(collector.metadata, getattr(task, "trust_remote_code", False)),
                factors=collector.metadata,
                fingerprint=fingerprint,
                save=self.save,
            )
        self._evaluate(stage, trainer, task)

    def _evaluate(self, stage: str, trainer: Trainer, task: TaskModule) -> None:
        task.stage = stage
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.run()
