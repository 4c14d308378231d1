"""The command line of ``train.py``: a LightningCLI with the package's defaults."""

import logging
import os
import sys
import warnings
from pathlib import Path

import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_kfac.callbacks import (
    CurvatureCollector,
    EditCallback,
    MiningWriter,
    RunProgress,
    RunReport,
    SaveTrainedModel,
)
from lightning_kfac.data.datamodule import TextData
from lightning_kfac.editor import EditConfig
from lightning_kfac.errors import InputError
from lightning_kfac.loading import skeleton
from lightning_kfac.modules import CausalLM
from lightning_kfac.progress import console
from lightning_kfac.run_folder import RunFolder
from lightning_kfac.strategies import strategy_for
from lightning_kfac.targets import resolve_targets

TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
}


class Parser(LightningArgumentParser):
    """Prints what is wrong, without fifty lines of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Ends the program with code 2 and one message."""
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


class TrainCLI(LightningCLI):
    """``fit`` collects curvature and edits (or trains), ``validate`` evaluates, ``predict`` mines."""

    def __init__(self, args: list[str] | None = None):
        self.command = "train.py " + " ".join(args if args is not None else sys.argv[1:])
        super().__init__(
            CausalLM,
            TextData,
            args=args,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            save_config_callback=None,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that come from elsewhere."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule", "verbose"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(CurvatureCollector, "collect")
        parser.add_argument("--edit", type=EditConfig | None, default=None, help="Edit the model after the collection.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace a finished run in the same folder.")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    # -- before anything expensive -------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.trainer.default_root_dir = config.trainer.default_root_dir or str(Path("runs") / self._run_name(config))
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.model_name

    def instantiate_trainer(self, **kwargs):
        """Adds the package's logger, strategy and callbacks to the user's own."""
        settings = self._get(self.config_init, "trainer")
        self.folder = RunFolder(settings["default_root_dir"])
        if settings["logger"] is None:
            kwargs["logger"] = TensorBoardLogger(settings["default_root_dir"], name="tensorboard", version="")
        kwargs["strategy"] = strategy_for(settings["strategy"], _n_processes(settings))
        own = settings["callbacks"] or []
        # Collection before edit, edit before report: the order of the callbacks is the order of work.
        kwargs["callbacks"] = [*self._callbacks(own), *own, RunReport(self.folder)]
        if settings["enable_progress_bar"] is not False:
            kwargs["callbacks"].append(RunProgress())
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Checks all input, says what will happen, and opens the run folder."""
        self._check_data()
        collector = next((c for c in self.trainer.callbacks if isinstance(c, CurvatureCollector)), None)
        targets = collector.targets(skeleton(self.model.config)) if collector else {}
        edit = next((c.config for c in self.trainer.callbacks if isinstance(c, EditCallback)), None)
        if edit is not None:
            _check_edit(edit, self.model, targets)
        if self.trainer.global_rank == 0:
            self.folder.check(self._get(self.config, "overwrite"))
            self.folder.begin(self.command, self._config_text())
            _announce(self, len(targets), edit)

    def before_validate(self) -> None:
        self._check_data()

    def before_predict(self) -> None:
        self._check_data()

    def after_fit(self) -> None:
        """Closes the run folder and says where everything is."""
        if self.trainer.global_rank == 0:
            self.folder.finish()
            path = self.folder.path
            present = [
                name
                for name in ("factors/", "edited/", "model/", "results.jsonl", "config.yaml")
                if (path / name).exists()
            ]
            console.print(f"Outputs in {path}/: {', '.join(present)}")
            console.print(f"TensorBoard: {_python()} -m tensorboard.main --logdir {path / 'tensorboard'}")

    # -- parts ---------------------------------------------------------------------------------------

    def _callbacks(self, existing: list) -> list:
        if self.subcommand == "predict":
            return [MiningWriter()]
        if self.subcommand != "fit":
            return []
        if not self.model.frozen:
            return [SaveTrainedModel()]
        callbacks = []
        if not any(isinstance(c, CurvatureCollector) for c in existing):
            callbacks.append(self._get(self.config_init, "collect"))
        if (edit := self._get(self.config_init, "edit")) is not None:
            callbacks.append(EditCallback(edit))
        return callbacks

    def _check_data(self) -> None:
        self.datamodule.check(self.model.vocab_size, self.model.max_positions)

    def _config_text(self) -> str:
        return self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)

    @staticmethod
    def _run_name(config) -> str:
        if config.config:
            return Path(str(config.config[-1])).stem
        return Path(config.model.model_name or "model").name


def main(args: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends in one line and exit code 2."""
    _quiet()
    try:
        TrainCLI(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _check_edit(edit: EditConfig, model: CausalLM, targets: dict) -> None:
    if edit.blocks == "all" and edit.projections is None:
        return
    wanted = resolve_targets(skeleton(model.config), edit.blocks, edit.projections or ("gate", "up", "down"))
    if edit.projections is not None and (absent := [name for name in wanted if name not in targets]):
        raise InputError(
            f"edit: {absent[0]} is to be edited but not collected; add it to collect.blocks or projections"
        )


def _announce(cli: TrainCLI, n_layers: int, edit: EditConfig | None) -> None:
    model, data = cli.model, cli.datamodule
    name = model.model_name or model.config.model_type
    budget = f"{data.max_tokens:,} tokens" if data.max_tokens else "all"
    if not model.frozen:
        steps = [f"train {name} on {data.corpus.label}"]
    else:
        steps = [f"collect the curvature of {n_layers} layers of {name} on {budget} of {data.corpus.label}"]
    if data.validation_names:
        steps.append(f"evaluate it on {', '.join(data.validation_names)}")
    if edit is not None:
        steps.append(f"edit it (formula {edit.formula}, rho {edit.rho}) and evaluate it again")
    console.print(f"{cli.folder.path}: " + "; ".join(f"{i}. {step}" for i, step in enumerate(steps, start=1)))


def _n_processes(settings: dict) -> int:
    devices, nodes = settings["devices"], settings["num_nodes"]
    return (len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1) * nodes


def _python() -> str:
    """How this interpreter is best called: relative where it lies below the working folder."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path.name


def _quiet() -> None:
    """Silences what Lightning tells on every start and what does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message)
    transformers.utils.logging.disable_progress_bar()
