"""CrystallizationStudy: has the model evaluated with its attention crystallized in every mode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_kfac.attention.comparison import BASELINE, FULL, TOP1, compare, lowrank
from lightning_kfac.attention.config import CrystallizeConfig
from lightning_kfac.attention.crystallized import Crystallization, crystallize
from lightning_kfac.attention.interface import attention_shapes
from lightning_kfac.attention.show import publish, save_figures
from lightning_kfac.attention.spectra import ResidualSpectra
from lightning_kfac.attention.study import Study
from lightning_kfac.callbacks.residuals import ResidualCollector
from lightning_kfac.callbacks.typed import causal_lm
from lightning_kfac.console import track_count
from lightning_kfac.data.names import HELDOUT
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.scoring import target_losses
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.perplexity import LossPerplexity
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.modules.text_data import TextData, text_data
from lightning_kfac.storage.files import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_kfac.modules.causal_lm import CausalLM

STUDY = "crystallization.json"


class CrystallizationStudy(Callback):
    """When ``fit`` has collected residual spectra, measures the model with crystallized attention in every mode.

    Each mode goes through the validation loop like an edited model (stages ``full``, ``lowrank R``, ``top1``). Top-1
    in one layer at a time, and in one head of the chosen layers at a time, is measured on the held-out text only.

    Args:
        config: Layers and ranks.
        collector: Of the residuals of these layers; before this one in the list of callbacks.

    Attributes:
        study: Everything that was measured, on every rank, after ``fit``.

    Example:
        >>> import tempfile, lightning
        >>> from lightning_kfac.callbacks import ResidualCollector
        >>> from lightning_kfac.modules.text_data import TextData
        >>> from lightning_kfac.modules import CausalLM
        >>> collector = ResidualCollector(layers=[5])
        >>> study = CrystallizationStudy(CrystallizeConfig(layers=[5], ranks=[4]), collector)
        >>> trainer = lightning.Trainer(
        ...     max_epochs=1, callbacks=[collector, study], default_root_dir=tempfile.mkdtemp(), accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> text = TextData(max_tokens=500, seq_len=100, heldout="embedded", heldout_tokens=300, tokenizer="demo")
        >>> trainer.fit(CausalLM("demo"), text)  # doctest: +ELLIPSIS
        Top-1 in one layer at a time...Top-1 attention in layer 5 ... the held-out perplexity: ...
        >>> study.study.comparison.costs["top1"].change.value > 0
        True
    """

    def __init__(self, config: CrystallizeConfig, collector: ResidualCollector):
        self.config = config
        self.collector = collector
        self.study: Study | None = None
        self._losses: dict[str, dict[int, tuple[float, int]]] = {}
        self._recited: dict[str, tuple[float, int] | None] = {}

    def check(self, trainer: Trainer, pl_module: LightningModule, data: TextData, model: "PreTrainedModel") -> None:
        """Raises ``InputError`` for what cannot be studied.

        Args:
            model: The model or, to know early, its skeleton.
        """
        self.collector.check(trainer, pl_module)
        if HELDOUT not in data.validation_names or trainer.limit_val_batches == 0:
            raise InputError("crystallize measures perplexity: set data.heldout")
        self.config.resolve(attention_shapes(model))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer, pl_module, text_data(trainer), causal_lm(pl_module).loaded)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = causal_lm(pl_module)
        shapes = attention_shapes(module.loaded)
        layers, ranks = self.config.resolve(shapes)
        if not module.results:  # the fit was cut short: no baseline yet
            trainer.fit_loop.epoch_loop.val_loop.run()
        self._note(BASELINE, module)
        for name, setting in _modes(ranks).items():
            module.stage = name
            with crystallize(module.loaded, dict.fromkeys(layers, setting), self._spectra):
                trainer.fit_loop.epoch_loop.val_loop.run()
                self._note(name, module)
        alone = _alone(layers, shapes)
        with track_count("Top-1 in one layer or head", "evaluations", total=len(alone)) as advance_to:
            for done, (name, settings) in enumerate(alone.items(), start=1):
                with crystallize(module.loaded, settings):
                    self._losses[name] = self._held_out(trainer, module)
                advance_to(done)
        self._conclude(trainer, ranks)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.study is not None:
            save_figures(self.study, Path(trainer.default_root_dir))
            publish(self.study, trainer.logger)

    @property
    def _spectra(self) -> ResidualSpectra:
        if self.collector.spectra is None:
            raise InputError("CrystallizationStudy needs its ResidualCollector before it in trainer.callbacks")
        return self.collector.spectra

    def _note(self, name: str, module: "CausalLM") -> None:
        """Keeps what an evaluation found: recitation, and the loss of every held-out document."""
        evaluation = module.latest
        accuracy = module.results.get("strict_acc")
        n_sequences = module.results.get("n_sequences")
        self._recited[name] = None if accuracy is None or n_sequences is None else (accuracy, int(n_sequences))
        self._losses[name] = _by_number(evaluation.numbers["perplexity"], evaluation.figures["perplexity"])

    def _held_out(self, trainer: Trainer, module: "CausalLM") -> dict[int, tuple[float, int]]:
        """Loss and number of targets of every held-out document, on every rank."""
        data = text_data(trainer)
        loader = data.val_dataloader()[data.validation_names.index(HELDOUT)]
        metric = LossPerplexity().to(module.device)
        for batch in loader:
            tokens = TokenBatch.from_dict(batch).to(module.device)
            with trainer.precision_plugin.forward_context():
                losses = target_losses(module.loaded, tokens)
            documents = data.texts.rows(HELDOUT).documents_of_targets(tokens.sample_index, tokens.shape[1])
            metric.update(losses, tokens.valid, tokens.sample_index, documents)
        metric.compute()
        return _by_number(metric.numbers, metric.figures["perplexity"])

    def _conclude(self, trainer: Trainer, ranks: list[int]) -> None:
        numbers = sorted(self._losses[BASELINE])
        losses = {name: np.array([found[number][0] for number in numbers]) for name, found in self._losses.items()}
        counts = np.array([self._losses[BASELINE][number][1] for number in numbers])
        self.study = Study(compare(losses, counts, ranks), self._spectra, self._recited)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / STUDY
            with new_file(path) as partial:
                partial.write_text(json.dumps(self.study.to_dict(), indent=2), "utf-8")


def _by_number(numbers: Tensor, figure: Figure) -> dict[int, tuple[float, int]]:
    found = zip(numbers.tolist(), figure.sums.tolist(), figure.weights.long().tolist(), strict=True)
    return {number: (loss, count) for number, loss, count in found}


def _modes(ranks: Sequence[int]) -> dict[str, Crystallization]:
    """From the mildest to the harshest, so that the report's examples are those of Top-1."""
    between = {lowrank(rank): Crystallization("lowrank", rank) for rank in reversed(ranks)}
    return {FULL: Crystallization("full"), **between, TOP1: Crystallization("top1")}


def _alone(layers: Sequence[int], shapes: Mapping[int, tuple[int, int]]) -> dict[str, dict[int, Crystallization]]:
    """Top-1 in each layer of the model, and in each head of the chosen layers."""
    each = {f"layer {layer}": {layer: Crystallization()} for layer in shapes}
    for layer in layers:
        for head in range(shapes[layer][0]):
            each[f"layer {layer} head {head}"] = {layer: Crystallization(heads=[head])}
    return each
