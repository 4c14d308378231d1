"""What comes next, in full: from what a model recites to factors, a setting, an edit, and a page about it."""

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_kfac.cli.options import NOT_SCANNED
from lightning_kfac.console import command_line, console
from lightning_kfac.models.source import ModelSource
from lightning_kfac.storage.run_folder import CONFIG

# What a search has of its own, and a collection has not.
OF_A_SEARCH = ("--data.corpus", "--data.mining", "--data.max_tokens", "--trainer.default_root_dir", "--overwrite")
PREDICT = "-predict"
# A scan takes them, and has no use for them.
OF_NO_SCAN = {"members", "nonmembers", "mining"}


def show_page(run: object) -> None:
    """The command that makes a run's page."""
    console.print(f"Page: {command_line('report', run)}")


def show_next(what: str, command: str, *words: object) -> None:
    """One command, on a line of its own."""
    console.print(f"Next, {what}:")
    console.print(f"  {command_line(command, *words)}")


def after_search(typed: Sequence[str], run: Path, kept: int, folder_is_default: bool) -> None:
    """After ``predict``: collect.

    Args:
        typed: The words of the command.
        run: Its folder.
        kept: Number of windows that the model recites.
        folder_is_default: Nobody chose the folder.
    """
    from lightning_kfac.callbacks.mining import MINED  # takes seconds, which a command beside Lightning has not

    show_page(run)
    if not kept:
        words = ["--texts", "FILE", "--model", "MODEL"]
        console.print("It recites none of it; how likely samples are to give a text away, the audit tells:")
        console.print(f"  {command_line('audit', *words)}")
        return
    words = ["--data.memorized", str(run / MINED)]
    kept_words = without_options(typed[1:], OF_A_SEARCH)
    has_config = any(word.partition("=")[0] in ("--config", "-c") for word in kept_words)
    general = [] if has_config else ["--data.corpus", "GENERAL_TEXT", "--data.heldout", "MORE_OF_IT"]
    name = run.name.removesuffix(PREDICT)
    place = [] if folder_is_default else ["--trainer.default_root_dir", run.with_name(f"{name}-fit")]
    show_next("the curvature of all blocks", "fit", *kept_words, *general, *words, *place)


def after_collection(run: Path, data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """After a ``fit`` without an edit: scan.

    Args:
        run: Its folder.
        data: Settings of its ``TextData``.
        model: Settings of its ``CausalLM``.
    """
    needed = {"memorized": "MEMORIZED_SET_OR_TEXTS", "heldout": "MORE_GENERAL_TEXT"}
    settings = {**data, **{name: data.get(name) or instead for name, instead in needed.items()}}
    own = ModelSource.named(model["model_name"]).name if model.get("model_name") else None
    skip = NOT_SCANNED | OF_NO_SCAN | ({"tokenizer"} if data.get("tokenizer") == own else set())
    words = ["--factors", run / "factors"]
    words += ["--dtype", model["dtype"]] if model["dtype"] != "auto" else []
    words += ["--trust_remote_code"] if model.get("trust_remote_code") else []
    show_next("which blocks and which rho", "scan", *words, *data_words(settings, skip), "--output", f"{run}-scan")


def after_edit(factors: Path, output: Path, name: str) -> None:
    """After ``apply``: measure, with the sets and texts of the run that collected.

    Args:
        factors: Folder of the factors.
        output: The edited model.
        name: The unedited model's.
    """
    config = factors.parent / CONFIG
    if config.is_file():
        words: list[object] = ["--config", config]
    else:
        words = ["--data.memorized", "MEMORIZED_SET_OR_TEXTS", "--data.heldout", "GENERAL_TEXT"]
    words += ["--model.model_name", output, "--trainer.default_root_dir", f"{output}-measured"]
    show_next(f"the edited model beside {name}", "validate", *words)


def without_options(words: Sequence[str], options: Collection[str]) -> list[str]:
    """A command line without some options, those below them, and their values.

    Example:
        >>> without_options(["--data.corpus", "a", "--data.mining.stride=3", "--config", "b"], OF_A_SEARCH)
        ['--config', 'b']
    """
    kept: list[str] = []
    drops = False
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0]
            drops = any(name == option or name.startswith(f"{option}.") for option in options)
        if not drops:
            kept.append(word)
    return kept


def data_words(settings: Mapping[str, Any], skip: Collection[str]) -> list[str]:
    """Options of ``TextData`` that are not at their defaults.

    Example:
        >>> data_words({"heldout": {"source": "a.txt"}, "seq_len": 128, "batch_size": 8}, ())
        ['--data.seq_len', '128', '--data.heldout', '{"source": "a.txt"}']
    """
    from lightning_kfac.modules.text_data import TextData

    words: list[str] = []
    for name, parameter in inspect.signature(TextData.__init__).parameters.items():
        value = settings.get(name, parameter.default)
        if name == "self" or name in skip or value == parameter.default:
            continue
        words += [f"--data.{name}", value if isinstance(value, str) else json.dumps(value)]
    return words
