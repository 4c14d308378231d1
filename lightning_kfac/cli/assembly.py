"""A run's parts from its config: what to go on with, logger, strategy, and the callbacks in the order of the work."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lightning_kfac.callbacks import (
    CrystallizationStudy,
    CurvatureCollector,
    EditCallback,
    MiningWriter,
    ResidualCollector,
    SaveTrainedModel,
    SpectrumLogger,
)
from lightning_kfac.callbacks.collection.state_writer import checkpoint_in, latest_checkpoint, step_of
from lightning_kfac.callbacks.mining import SEARCHED
from lightning_kfac.distributed.strategies import ShardedStrategy, strategy_for
from lightning_kfac.errors import InputError
from lightning_kfac.storage.run_folder import EVENTS, OUTPUTS, RESULTS, STATUS, RunFolder


def default_folder(command: str, config: Namespace) -> str:
    """``runs/NAME``, after the last config file or the model; ``runs/NAME-COMMAND`` of validate and predict."""
    name = Path(str(config.config[-1])).stem if config.config else Path(config.model.model_name or "model").name
    return str(Path("runs") / (f"{name}-{command}" if command in ("validate", "predict") else name))


def kind_and_outputs(command: str, config: Namespace, model: LightningModule) -> tuple[str, tuple[str, ...]]:
    """What kind of run this is, and what it writes: two of different kinds never share a folder."""
    if command == "predict":
        return command, (*SEARCHED, EVENTS)
    if command == "validate":
        return command, (RESULTS, EVENTS, STATUS)
    if config.get("crystallize") is not None:
        return "crystallize", OUTPUTS
    return "collection" if model.frozen else "training", OUTPUTS


def state_to_resume(config: Namespace) -> Path | None:
    """The state of an interrupted collection that ``fit`` goes on from: the newest in the run's folder, or a named one.

    Raises:
        InputError: ``ckpt_path`` names nothing there, or comes with ``overwrite``.
    """
    root = Path(config.trainer.default_root_dir)
    named = config.ckpt_path
    found = latest_checkpoint(root) if named in (None, "last") else checkpoint_in(Path(named), root)
    if named == "last" and found is None:
        raise InputError(f"ckpt_path: {root} holds no interrupted collection")
    if named is not None and config.overwrite:
        raise InputError("ckpt_path goes on with a run, overwrite begins anew; choose one")
    return found if named is not None or RunFolder(root).interrupted else None


def trainer_parts(settings: Namespace, state: str | Path | None) -> dict[str, Any]:
    """Keyword arguments of the Trainer beside the user's own.

    Args:
        settings: The section ``trainer``.
        state: The run goes on from it.
    """
    parts: dict[str, Any] = {"strategy": strategy_for(settings.as_dict())}
    if settings["logger"] is None:
        # What an interrupted run wrote after its last state is written again.
        again: dict[str, Any] = {"purge_step": step_of(state)} if state else {}
        parts["logger"] = TensorBoardLogger(settings["default_root_dir"], name=EVENTS, version="", **again)
    # The job script asks for another turn; Lightning's own way saves no sums.
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        parts["plugins"] = [*(settings["plugins"] or []), SLURMEnvironment(auto_requeue=False)]
    if isinstance(parts["strategy"], ShardedStrategy):
        parts["inference_mode"] = False  # weights that are put together in it could not be used outside
    return parts


def working_callbacks(config: Namespace, model: LightningModule, own: list[Callback]) -> list[Callback]:
    """What ``fit`` does: collect (or train, or study attention), then edit.

    Args:
        config: Sections with their classes made: ``collect``, ``edit``, ``crystallize``, ``save``.
        model: Trained where it is not frozen.
        own: The user's callbacks, which may be among these.
    """
    callbacks: list[Callback] = []
    study = config.get("crystallize")
    if study is not None:
        residuals = ResidualCollector(study.layers)
        callbacks += [residuals, CrystallizationStudy(study, residuals)]
    elif not model.frozen:
        callbacks.append(SaveTrainedModel())
    elif not _holds(own, CurvatureCollector):
        callbacks.append(config.get("collect"))
    if model.frozen and study is None and not _holds(own, SpectrumLogger):
        callbacks.append(SpectrumLogger())
    if (edit := config.get("edit")) is not None:
        callbacks.append(EditCallback(edit, config.get("save")))
    return callbacks


def callbacks_for(command: str, config: Namespace, model: LightningModule, own: list[Callback]) -> list[Callback]:
    """The callbacks of a subcommand that come before the user's own."""
    if command == "predict":
        return [MiningWriter()]
    return working_callbacks(config, model, own) if command == "fit" else []


def _holds(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
