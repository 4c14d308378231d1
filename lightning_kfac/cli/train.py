"""The command line of ``fit``, ``validate`` and ``predict``: a LightningCLI with the package's defaults."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_kfac.attention.config import CrystallizeConfig
from lightning_kfac.callbacks import CurvatureCollector, EditCallback, RankWatch, RunProgress, RunReport
from lightning_kfac.callbacks.mining import MINED, SUMMARY
from lightning_kfac.callbacks.typed import find_callback
from lightning_kfac.cli import next_steps, preflight
from lightning_kfac.cli.assembly import (
    callbacks_for,
    default_folder,
    kind_and_outputs,
    state_to_resume,
    trainer_parts,
)
from lightning_kfac.cli.figures_out import add_json_option, figures_in, print_figures, said_elsewhere
from lightning_kfac.cli.foreign_code import announce_code
from lightning_kfac.cli.interrupts import Interrupts
from lightning_kfac.cli.overview import TRAINING
from lightning_kfac.cli.parsers import InputErrors, input_error_behind, usage, with_underscores
from lightning_kfac.cli.preflight import (
    check_bulk_share,
    check_model,
    check_place,
    check_reference,
    check_search,
    make_room_for_mining,
)
from lightning_kfac.cli.quiet import quiet, without_loading_bar
from lightning_kfac.cli.shipped import with_config_paths
from lightning_kfac.cli.tasks import TASK_HELP, TASK_OPTION, TASKS, TEXT, task_named
from lightning_kfac.console import command_line, console, say, say_error
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import Save, edit_details, find_reference
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.storage.files import disk_error
from lightning_kfac.storage.run_folder import CONFIG, RESULTS, STATE, RunFolder
from lightning_kfac.storage.yaml_files import check_config_files

TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
}

# The Trainer has sixty options; --help shows those that a user of this package is likely to set.
SHOWN_TRAINER_OPTIONS = ("accelerator", "default_root_dir", "devices", "num_nodes", "precision", "strategy")
HELP = {
    "trainer.strategy": "Several devices: ddp, or fsdp for a model larger than one device. (default: auto)",
    "trainer.default_root_dir": "Folder of the run. (default: runs/NAME, after the config file or the model; "
    "validate has runs/NAME-validate, predict runs/NAME-predict)",
    "ckpt_path": "Go on from this state of the run's folder (state/step-N, or last) instead of the newest one.",
    "weights_only": argparse.SUPPRESS,
}
JSON = "--json"
FOLDERS = ("factors/", "domains/", "edited/", "patch/", "model/", "residuals/")
CRYSTALLIZATION = "crystallization.json"
MEASURED = (RESULTS, CONFIG, "tensorboard/")


class Parser(InputErrors, LightningArgumentParser):
    """Lightning's parser with our errors."""


class TrainCLI(LightningCLI):
    """``fit`` collects curvature and edits (or trains), ``validate`` evaluates, ``predict`` mines.

    Args:
        args: Words of the command, with the paths of configs.
        typed: What the user typed.
        task: Whose module and data module, and whose checks: ``text`` or ``images``.
    """

    def __init__(self, args: list[str] | None = None, typed: list[str] | None = None, task: str = TEXT):
        self.task = task
        self.words = list(typed or args or sys.argv[1:])
        self.first_word = next(iter(args or self.words), "")
        self.typed = command_line(*self.words)
        super().__init__(
            *_parts(task),
            args=args,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={command: {"description": TRAINING[command]} for command in self.subcommands()},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # LightningCLI asks its instance
        """The commands, and the arguments of the Trainer's methods that come from elsewhere.

        Of one that stands first, it alone: its parser has a hundred options, and takes as long to make as to use.
        """
        commands = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule", "verbose"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions"},
        }
        return {self.first_word: commands[self.first_word]} if self.first_word in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections and options beside model, data and trainer; of the Trainer's own only a few are shown."""
        parser.add_class_arguments(CurvatureCollector, "collect")
        parser.add_argument("--edit", type=EditConfig | None, default=None, help="Edit the model after the collection.")
        crystallize = "Instead of curvature: study crystallized attention."
        parser.add_argument("--crystallize", type=CrystallizeConfig | None, default=None, help=crystallize)
        parser.add_argument("--save", type=Save, default="full", help="The edited model: checkpoint, patch or nothing.")
        parser.add_argument("--overwrite", action="store_true", help="Replace a finished run in the same folder.")
        add_json_option(parser)
        parser.add_argument("--dry_run", action="store_true", help="Check everything and say what fit would do.")
        parser.add_argument(TASK_OPTION, type=Literal[TASKS], default=self.task, help=TASK_HELP)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.epilog = (
            "--edit.rho, --edit.formula and everything else about the edit is explained by "
            "--edit.help. Every other option of Lightning's Trainer works too; --print_config lists them."
        )
        for action in parser._actions:
            group, _, name = action.dest.partition(".")
            if group == "trainer" and name not in SHOWN_TRAINER_OPTIONS:
                action.help = argparse.SUPPRESS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = usage(subcommand, "--config CONFIG")
        parser.set_defaults(weights_only=True)  # of a training's checkpoint, which is a pickle
        for action in parser._actions:
            action.help = HELP.get(action.dest, action.help)
            if action.dest == "ckpt_path" and subcommand != "fit":
                action.help = argparse.SUPPRESS
        return parser

    # -- before anything expensive -------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Defaults that depend on other settings, and the state of an interrupted run to go on from."""
        config = self.config[self.subcommand]
        self.folder_is_default = config.trainer.default_root_dir is None
        config.trainer.default_root_dir = config.trainer.default_root_dir or default_folder(self._command, config)
        folder = str(config.trainer.default_root_dir)
        if "://" in folder:
            raise InputError(f"trainer.default_root_dir {folder}: an address; a run writes into a local folder")
        if self.task != TEXT and self.subcommand != "fit":
            raise InputError(f"{self.task}: a task of fit; {self.subcommand} is for language models")
        if config.dry_run and self.subcommand != "fit":
            raise InputError(f"dry_run: fit has one; {self.subcommand} has not, leave it out", "dry_run")
        if self.task == TEXT and config.data.tokenizer is None:
            config.data.tokenizer = _model_name(config.model)
        self.state = None  # of an interrupted collection, to go on from
        if self._collects(config) and (config.ckpt_path or not config.overwrite):
            self.state = state_to_resume(config)
            config.ckpt_path = self.state and str(self.state)

    def _collects(self, config: Namespace) -> bool:
        """Whether the run collects curvature, and so can go on with an interrupted collection."""
        trains = self.task == TEXT and config.model.training is not None
        return self.subcommand == "fit" and not trains and config.crystallize is None

    def _parse_ckpt_path(self) -> None:
        """Lightning would read settings from the file; ours come from the command."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the package's logger, strategy and callbacks to the user's own."""
        settings = self._get(self.config_init, "trainer")
        kind, outputs = kind_and_outputs(self._command, self.config_init[self._command], self.model)
        self.folder = RunFolder(settings["default_root_dir"], kind, outputs)
        kwargs |= trainer_parts(settings, self.state)
        own = settings["callbacks"] or []
        # Collection before edit, edit before report: the order of the callbacks is the order of work.
        working = callbacks_for(self._command, self.config_init[self._command], self.model, own)
        self.report = RunReport(self.folder, self.typed, self._config_text(), self.state is not None)
        kwargs["callbacks"] = [*working, *own, self.report, RankWatch()]
        if settings["enable_progress_bar"] is not False:
            kwargs["callbacks"].append(RunProgress())
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Checks all input and says what will happen."""
        self._check_data()
        before = _preflight(self.task)
        parts = self.trainer, self.model, self.datamodule
        targets = before.check_fit(*parts)
        if self._get(self.config, "dry_run"):
            self._show_dry_run(targets)
        if (collector := find_callback(self.trainer, CurvatureCollector)) is not None:
            collector.keep_state = True  # until the edit is saved and evaluated
        if self.trainer.global_rank == 0:
            self.folder.lock()
            self.folder.check(self._get(self.config, "overwrite"), before.inputs(*parts[1:]))
            self.folder.claim(self.typed)
            before.announce(self.folder.path, *parts, len(targets))

    def _show_dry_run(self, targets: Mapping[str, Layer]) -> NoReturn:
        """What the run would do; ends the program."""
        path = self.folder.path
        parts = self.trainer, self.model, self.datamodule
        before = _preflight(self.task)
        if path.exists():
            self.folder.check(self._get(self.config, "overwrite"), before.inputs(*parts[1:]))
        before.announce(path, *parts, len(targets))
        for name, layer in targets.items():
            console.print(f"  {name} [{' x '.join(map(str, layer.described() or ()))}]")
        again = [word for word in self.words if word.replace("-", "_") != "__dry_run"]
        console.print("Options, model, layers and sets are good; nothing was computed or written. To run it:")
        console.print(f"  {command_line(*again)}")
        configs = self.config[self._command].config
        words = ["--train_config", str(configs[-1])] if configs else ["--help"]
        console.print(f"How long it takes, and with how much memory: {command_line('plan', *words)}")
        raise SystemExit(0)

    def before_validate(self) -> None:
        """Checks all input."""
        self._check_data()
        if not self.datamodule.validation_names:
            raise InputError("there is nothing to evaluate on: set data.memorized, data.heldout or data.members")
        if self.trainer.global_rank == 0:
            self.folder.lock()
            self.folder.check(overwrite=True, replaces=())  # results are added to those that are there
            self.folder.claim()

    def before_predict(self) -> None:
        """Checks all input."""
        self.datamodule.read_as(self.model.source)
        check_search(self.trainer, self.model, self.datamodule)
        self._check_data()
        if self.trainer.global_rank == 0:
            self.folder.lock()
            make_room_for_mining(self.folder, self._get(self.config, "overwrite"), self.datamodule.windows_before)

    def _check_data(self) -> None:
        check_place(self.folder.path, self.model.source)
        if self.task != TEXT:
            return  # its data module has checked its settings, and there is no file to read
        check_model(self.model)
        self.datamodule.read_as(self.model.source)
        self.datamodule.check(self.model.vocab_size, self.model.max_positions)
        check_reference(self.model, self.datamodule)
        check_bulk_share(self.trainer, self.model, self.datamodule)
        self.model.evaluation_folder = self.folder.path / STATE

    # -- the work ------------------------------------------------------------------------------------

    def validate(self, **kwargs: Any) -> None:
        """Evaluates the unedited model, if there is one, then the model itself; RunReport compares them."""
        model = self.model
        details = edit_details(model.source)
        reference = None
        why = "the unedited model is skipped"
        if not model.skip_baseline:
            reference, why = find_reference(model.source, model.reference, model.vocab_size)
        if reference:
            model.turn_to("baseline", reference)
            self.trainer.validate(verbose=False, **kwargs)
            self._check_reference(reference, details)
            model.turn_to("edited", model.source)
            model.edited_layers = [layer["name"] for layer in details.get("layers", [])]
        elif details or model.reference:
            model.turn_to("edited", model.source)
            say(f"nDCG@10 and changes are not measured: {why}; --model.reference names the unedited model")
        self.trainer.validate(verbose=False, **kwargs)
        if self.trainer.global_rank == 0:
            self.report.show_comparison(self.trainer)
            self.report.show_extraction(self.trainer)
            self.folder.note(self.typed)
            console.print(f"Outputs in {self.folder.path}/: {', '.join(self._present(MEASURED))}")
            next_steps.show_page(self.folder.path)

    def _check_reference(self, reference: ModelSource, details: dict[str, Any]) -> None:
        """Says where the reference is not what was edited."""
        layers = [layer["name"] for layer in details.get("layers", [])]
        if layers and weights_fingerprint(self.model.model, layers) != details.get("fingerprint"):
            say(f"note: {reference} has other weights than the model that was edited, or another dtype")

    def after_fit(self) -> None:
        """Closes the run folder and says where everything is."""
        if self.trainer.global_rank == 0:
            self.folder.finish()
            path = self.folder.path
            console.print(f"Outputs in {path}/: {', '.join(self._present((*FOLDERS, CRYSTALLIZATION, *MEASURED)))}")
            if isinstance(logger := self.trainer.logger, TensorBoardLogger):
                words = ["--logdir", str(Path(logger.log_dir)), "--window_title", path.resolve().name]
                console.print(f"TensorBoard: {_python()} -m tensorboard.main {shlex.join(words)}")
            next_steps.show_page(path)
            config = self.config[self._command]
            collects = find_callback(self.trainer, CurvatureCollector) and self.task == TEXT
            if collects and not find_callback(self.trainer, EditCallback):
                next_steps.after_collection(path, config.data.as_dict(), config.model.as_dict())

    def after_predict(self) -> None:
        """Says where everything is, once a search has finished."""
        path = self.folder.path
        if self.trainer.global_rank == 0 and (path / MINED).exists():
            kept = sum(1 for line in (path / MINED).read_text("utf-8").splitlines() if line)
            next_steps.after_search(self.words, path, kept, self.folder_is_default)

    def figures(self) -> Any:
        """For ``--json``: the evaluations of this run, or the counts of its search."""
        if self._command == "validate":  # adds to what is there
            return self.report.rows
        return figures_in(self.folder.path / (SUMMARY if self._command == "predict" else RESULTS))

    def _present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if (self.folder.path / name).exists()]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        finally:
            self.folder.unlock()

    @property
    def _command(self) -> str:
        return str(self.subcommand)

    def _config_text(self) -> str:
        config = self.config[self._command].clone()
        config.overwrite = False  # running a saved config again must not replace anything unasked
        config.dry_run = False
        if "ckpt_path" in config:
            config.ckpt_path = None
        return str(self._parser(self._command).dump(config, skip_unset=False))


def main(args: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends in one line and exit code 2."""
    quiet()
    without_loading_bar()
    typed = sys.argv[1:] if args is None else args
    interrupts = Interrupts()
    try:
        with interrupts:
            words = with_config_paths(with_underscores(typed))
            asked = JSON in words
            words = [word for word in words if word != JSON]
            check_config_files(words)
            announce_code(words)
            with said_elsewhere(asked):
                done = TrainCLI(words, typed, task_named(words))
            if asked and done.trainer.global_rank == 0:
                print_figures(done.figures())
    except ValueError as error:
        own = input_error_behind(error)
        if own is None:
            raise
        say_error(f"{_rank()}error: {own.with_options()}")
        raise SystemExit(2) from None
    except OSError as error:
        if (said := disk_error(error)) is None:
            raise
        say_error(f"{_rank()}error: {said}")
        raise SystemExit(2) from None
    except SIGTERMException:
        by = "Ctrl-C" if interrupts.seen else "SIGTERM"
        say_error(f"{_rank()}stopped by {by}; what was done is kept, the same command goes on from there")
        raise SystemExit(130 if interrupts.seen else 143) from None
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not interrupts.seen:
            raise
        say_error(f"{_rank()}stopped by Ctrl-C; what was saved before is kept, the same command goes on from there")
        raise SystemExit(130) from None


def _parts(task: str) -> tuple[type[Any], type[Any]]:
    """The LightningModule and the data module of a task."""
    if task == TEXT:
        return CausalLM, TextData
    from lightning_kfac.modules.image_classifier import ImageClassifier
    from lightning_kfac.modules.image_data import ImageData

    return ImageClassifier, ImageData


def _preflight(task: str) -> ModuleType:
    """What checks a fit of a task, and announces it."""
    if task == TEXT:
        return preflight
    from lightning_kfac.cli import image_preflight

    return image_preflight


def _model_name(settings: Any) -> str | None:
    """The model's name without a revision that was written behind it."""
    name = settings.model_name
    return None if name is None else ModelSource.named(name, settings.revision).name


def _rank() -> str:
    """What messages of other ranks than the first begin with."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return "" if rank == "0" else f"rank {rank}: "


def _python() -> str:
    """How this interpreter is best called: by its name, or relative where it lies below the working folder."""
    path = Path(sys.executable)
    if shutil.which(path.name) == str(path):
        return path.name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
