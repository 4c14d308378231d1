"""The command line of ``train.py``: a LightningCLI with the package's defaults."""

import argparse
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_kfac.assets import resolve_path
from lightning_kfac.attention.config import CrystallizeConfig
from lightning_kfac.callbacks import (
    CrystallizationStudy,
    CurvatureCollector,
    EditCallback,
    MiningWriter,
    RankWatch,
    ResidualCollector,
    RunProgress,
    RunReport,
    SaveTrainedModel,
    SpectrumLogger,
)
from lightning_kfac.callbacks.collection.state_writer import checkpoint_in, latest_checkpoint, step_of
from lightning_kfac.callbacks.mining import LOG, MINED, REPETITIONS, SUMMARY
from lightning_kfac.cli.parsers import InputErrors, input_error_behind
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.console import console, say
from lightning_kfac.distributed.strategies import ShardedStrategy, strategy_for
from lightning_kfac.editing.checks import check_untied
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import Save, edit_details, find_reference
from lightning_kfac.errors import InputError
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import count_blocks, narrow
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.storage.run_folder import EVENTS, STATE, RunFolder
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
    "trainer.default_root_dir": "Folder of the run. (default: runs/NAME, after the config file or the model)",
    "ckpt_path": "Go on from this state of the run's folder (state/step-N, or last) instead of the newest one.",
    "weights_only": argparse.SUPPRESS,
}
FOLDERS = ("factors/", "domains/", "edited/", "patch/", "model/", "residuals/")
DESCRIPTIONS = {
    "fit": "Collect curvature, and with an edit section edit and evaluate; or train a model.",
    "validate": "Evaluate a model: recitation, answers, perplexity; an edited one beside the model that was edited.",
    "predict": "Look through a corpus for windows that the model recites. --data.mining.help tells how.",
}


class Parser(InputErrors, LightningArgumentParser):
    """Lightning's parser with our errors."""


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
            parser_kwargs={command: {"description": text} for command, text in DESCRIPTIONS.items()},
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
        crystallize = "Instead of curvature: study crystallized attention."
        parser.add_argument("--crystallize", type=CrystallizeConfig | None, default=None, help=crystallize)
        parser.add_argument("--save", type=Save, default="full", help="The edited model: checkpoint, patch or nothing.")
        parser.add_argument("--overwrite", action="store_true", help="Replace a finished run in the same folder.")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.usage = "python train.py COMMAND --config FILE [--OPTION VALUE ...]"
        parser.epilog = (
            "--edit.rho, --edit.formula and everything else about the edit is explained by "
            "--edit.help. Every other option of Lightning's Trainer works too; --print_config lists them."
        )
        for action in parser._actions:
            group, _, name = action.dest.partition(".")
            if group == "trainer" and name not in SHOWN_TRAINER_OPTIONS:
                action.help = argparse.SUPPRESS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)  # of a training's checkpoint, which is a pickle
        for action in parser._actions:
            action.help = HELP.get(action.dest, action.help)
            if action.dest == "ckpt_path" and subcommand != "fit":
                action.help = argparse.SUPPRESS
        return parser

    # -- before anything expensive -------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.trainer.default_root_dir = config.trainer.default_root_dir or str(Path("runs") / self._run_name(config))
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.model_name
        self._find_state(config)

    def _parse_ckpt_path(self) -> None:
        """Lightning would read settings from the file; ours come from the command."""

    def _find_state(self, config) -> None:
        """Has an interrupted collection in the run's folder gone on with, or the one that ``ckpt_path`` names."""
        self.resumed = False
        collects = self.subcommand == "fit" and config.model.training is None and config.crystallize is None
        if not collects or (config.overwrite and not config.ckpt_path):
            return
        root, named = Path(config.trainer.default_root_dir), config.ckpt_path
        found = latest_checkpoint(root) if named in (None, "last") else checkpoint_in(Path(named), root)
        if named == "last" and found is None:
            raise InputError(f"ckpt_path: {root} holds no interrupted collection")
        if named is not None and config.overwrite:
            raise InputError("ckpt_path goes on with a run, overwrite begins anew; choose one")
        if named is not None or RunFolder(root).interrupted:
            config.ckpt_path, self.resumed = found and str(found), found is not None

    def instantiate_trainer(self, **kwargs):
        """Adds the package's logger, strategy and callbacks to the user's own."""
        settings = self._get(self.config_init, "trainer")
        self.folder = RunFolder(settings["default_root_dir"])
        if settings["logger"] is None:
            # What an interrupted run wrote after its last state is written again.
            again = {"purge_step": step_of(self._get(self.config_init, "ckpt_path"))} if self.resumed else {}
            kwargs["logger"] = TensorBoardLogger(settings["default_root_dir"], name=EVENTS, version="", **again)
        kwargs["strategy"] = strategy_for(settings)
        # The job script asks for another turn; Lightning's own way saves no sums.
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            kwargs["plugins"] = [*(settings["plugins"] or []), SLURMEnvironment(auto_requeue=False)]
        if isinstance(kwargs["strategy"], ShardedStrategy):
            kwargs["inference_mode"] = False  # weights that are put together in it could not be used outside
        own = settings["callbacks"] or []
        # Collection before edit, edit before report: the order of the callbacks is the order of work.
        report = RunReport(self.folder, self.command, self._config_text(), self.resumed)
        kwargs["callbacks"] = [*self._callbacks(own), *own, report, RankWatch()]
        if settings["enable_progress_bar"] is not False:
            kwargs["callbacks"].append(RunProgress())
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Checks all input and says what will happen."""
        self._check_data()
        self.model.evaluation_folder = self.folder.path / STATE
        collector, edit = self._callback(CurvatureCollector), self._callback(EditCallback)
        targets, study = {}, self._callback(CrystallizationStudy)
        sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if sharded and (study is not None or not self.model.frozen):
            raise InputError("trainer.strategy fsdp is for collections: train and crystallize with ddp")
        if study is not None:
            model = skeleton(self.model.config, self.model.trust_remote_code)
            with suppress(RuntimeError):  # some experts do not run on the meta device; fit checks again
                study.check(self.trainer, self.model, self.datamodule, model)
        if collector is not None:
            collector.check(self.trainer, self.model)
            model = skeleton(self.model.config, self.model.trust_remote_code)
            targets = collector.targets(model)
        if edit is not None:
            if collector is None:
                raise InputError("an edit needs a collection: leave model.training and crystallize out")
            check_untied(model, targets.values())
            chosen = narrow(list(targets), count_blocks(model), edit.config.blocks, edit.config.projections)
            edit.check(chosen, list(self.datamodule.domains), collector)
        if collector is not None:
            collector.keep_state = True  # until the edit is saved and evaluated
        if self.trainer.global_rank == 0:
            self.folder.lock()
            self.folder.check(self._get(self.config, "overwrite"), self._inputs())
            self.folder.claim(self.command)
            self._announce(len(targets), edit and edit.config, study and study.config)

    def before_validate(self) -> None:
        """Checks all input."""
        self._check_data()
        self.model.evaluation_folder = self.folder.path / STATE
        if not self.datamodule.validation_names:
            raise InputError("there is nothing to evaluate on: set data.memorized or data.heldout")
        if self.trainer.global_rank == 0:
            self.folder.lock()

    def validate(self, **kwargs) -> None:
        """Evaluates the unedited model, if there is one, then the model itself; RunReport compares them."""
        model = self.model
        edited, reference, why = bool(edit_details(model.model_name)), None, "the baseline is skipped"
        if not model.skip_baseline:
            names = model.model_name, model.reference
            reference, why = find_reference(*names, model.vocab_size, model.trust_remote_code)
        if reference:
            model.turn_to("baseline", reference)
            self.trainer.validate(verbose=False, **kwargs)
            self._check_reference(reference)
            model.turn_to("edited", model.model_name)
            model.edited_layers = [layer["name"] for layer in edit_details(model.model_name).get("layers", [])]
        elif edited or model.reference:
            model.turn_to("edited", model.model_name)
            say(f"nDCG@10 and changes are not measured: {why}; --model.reference names the unedited model")
        self.trainer.validate(verbose=False, **kwargs)
        if self.trainer.global_rank == 0:
            self._callback(RunReport).show_comparison()
            self.folder.note(self.command)

    def _check_reference(self, reference: str) -> None:
        """Says where the reference is not what was edited."""
        details = edit_details(self.model.model_name)
        layers = [layer["name"] for layer in details.get("layers", [])]
        if layers and weights_fingerprint(self.model.model, layers) != details.get("fingerprint"):
            say(f"note: {reference} has other weights than the model that was edited, or another dtype")

    def before_predict(self) -> None:
        """Checks all input; a finished search is replaced only if asked for, an unfinished one goes on."""
        self._check_data()
        if self.trainer.global_rank == 0:
            self.folder.lock()
        found, overwrite = self.folder.path / MINED, self._get(self.config, "overwrite")
        if found.exists() and not overwrite:
            raise InputError(f"{found} is already there; add --overwrite to replace it")
        if overwrite and self.trainer.global_rank == 0:
            for name in (MINED, REPETITIONS, SUMMARY):
                (self.folder.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder.path / LOG, ignore_errors=True)

    def after_fit(self) -> None:
        """Closes the run folder and says where everything is."""
        if self.trainer.global_rank == 0:
            self.folder.finish()
            path = self.folder.path
            present = [
                name
                for name in (*FOLDERS, "crystallization.json", "results.jsonl", "config.yaml")
                if (path / name).exists()
            ]
            console.print(f"Outputs in {path}/: {', '.join(present)}")
            if isinstance(self.trainer.logger, TensorBoardLogger):
                console.print(f"TensorBoard: {_python()} -m tensorboard.main --logdir {path / 'tensorboard'}")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        finally:
            self.folder.unlock()

    # -- parts ---------------------------------------------------------------------------------------

    def _callbacks(self, existing: list) -> list:
        if self.subcommand == "predict":
            return [MiningWriter()]
        if self.subcommand != "fit":
            return []
        callbacks = []
        if (crystallize := self._get(self.config_init, "crystallize")) is not None:
            residuals = ResidualCollector(crystallize.layers)
            callbacks += [residuals, CrystallizationStudy(crystallize, residuals)]
        elif not self.model.frozen:
            callbacks.append(SaveTrainedModel())
        elif not any(isinstance(c, CurvatureCollector) for c in existing):
            callbacks.append(self._get(self.config_init, "collect"))
        elsewhere = crystallize is not None or any(isinstance(c, SpectrumLogger) for c in existing)
        if self.model.frozen and not elsewhere:
            callbacks.append(SpectrumLogger())
        if (edit := self._get(self.config_init, "edit")) is not None:
            callbacks.append(EditCallback(edit, self._get(self.config_init, "save")))
        return callbacks

    def _callback(self, kind: type):
        return next((c for c in self.trainer.callbacks if isinstance(c, kind)), None)

    def _announce(self, n_layers: int, edit: EditConfig | None, study: CrystallizeConfig | None) -> None:
        model, data = self.model, self.datamodule
        name = model.model_name or f"a new {model.config.model_type}"
        text = f"{f'{data.max_tokens:,} tokens' if data.max_tokens else 'all'} of {data.corpus.label}"
        domains = "".join(f" and on {domain.label}" for domain in data.domains.values())
        steps = [f"collect the curvature of {n_layers} layers of {name} on {text}{domains}"]
        if study is not None:
            steps = [f"collect the attention residuals of layers {list(study.layers)} of {name} on {text}"]
        if not model.frozen:
            steps = [f"train {name} on {text}"]
        if data.validation_names:
            steps.append(f"evaluate it on {', '.join(data.validation_names)}")
        if study is not None:
            steps.append("crystallize these layers in every mode and evaluate it again")
        if edit is not None:
            what = f"formula {edit.formula}, rho {edit.rho}"
            if data.domains:
                steps.append(f"edit it ({what}), evaluate it again, and take the edit back")
                what += f", protecting {', '.join(data.domains)} as well"
            steps.append(f"edit it ({what}), save it and evaluate it again")
        console.print(f"{self.folder.path}: " + "; ".join(f"{i}. {step}" for i, step in enumerate(steps, start=1)))

    def _inputs(self) -> list[str | Path | None]:
        """Paths that the run reads."""
        data, model = self.datamodule, self.model
        texts = (data.corpus, data.heldout, *data.domains.values())
        corpora = [corpus.source for corpus in texts if corpus is not None]
        files = [*data.memorized_files.values(), *(questions.source for questions in data.question_sets.values())]
        return [resolve_path(path) for path in (model.model_name, *corpora, *files) if path]

    def _check_data(self) -> None:
        self.datamodule.check(self.model.vocab_size, self.model.max_positions)

    def _config_text(self) -> str:
        config = self.config[self.subcommand].clone()
        config.overwrite = False  # running a saved config again must not replace anything unasked
        if "ckpt_path" in config:
            config.ckpt_path = None
        return self._parser(self.subcommand).dump(config, skip_unset=False)

    @staticmethod
    def _run_name(config) -> str:
        if config.config:
            return Path(str(config.config[-1])).stem
        return Path(config.model.model_name or "model").name


def main(args: list[str] | None = None) -> None:
    """Runs a command; what the user can mend ends in one line and exit code 2."""
    quiet()
    try:
        check_config_files(sys.argv[1:] if args is None else args)
        TrainCLI(args)
    except ValueError as error:
        own = input_error_behind(error)
        if own is None:
            raise
        print(f"{_rank()}error: {own}", file=sys.stderr)
        raise SystemExit(2) from None
    except SIGTERMException:
        print(
            f"{_rank()}stopped by SIGTERM; what was done is kept, the same command goes on from there", file=sys.stderr
        )
        raise SystemExit(143) from None


def _rank() -> str:
    """What messages of other ranks than the first begin with."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return "" if rank == "0" else f"rank {rank}: "


def _python() -> str:
    """How this interpreter is best called: relative where it lies below the working folder."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path.name
