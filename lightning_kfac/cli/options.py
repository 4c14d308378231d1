"""What several commands share."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_kfac.cli.quiet import without_loading_bar
from lightning_kfac.console import command_line, say
from lightning_kfac.editing.checks import tokenizer_of
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder, load_factors
from lightning_kfac.models.loading import Dtype, load_model, load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.stored import stored_tensors
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.output_folder import OutputFolder

# Settings of the data that only a collection or a training reads, and those that a scan, of one set, leaves out too.
NOT_MEASURED = {"corpus", "max_tokens", "planted", "exposures", "shuffle", "domains", "domain_tokens"}
NOT_SCANNED = NOT_MEASURED | {"sets", "questions", "clean_windows"}

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_model_options(
    parser: ArgumentParser, required: bool = False, otherwise: str = "By default the one that the factors name."
) -> None:
    """Which model, of which revision, from which file, and in which dtype.

    Args:
        otherwise: What else there is to say of a model that need not be named.
    """
    parser.add_argument(
        "--model",
        type=str,
        required=required,
        help="Hub name, folder, or demo." + ("" if required else f" {otherwise}"),
    )
    parser.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    parser.add_argument("--gguf_file", type=str | None, help="A GGUF file in the model's folder or repository.")
    parser.add_argument("--adapter", type=str | None, help="Adapter (peft) to merge: folder or hub name.")
    parser.add_argument("--dtype", type=Dtype, default="auto", help="Of the weights; auto is the checkpoint's own.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Let the model's repository run its code.")


def add_editing_options(parser: ArgumentParser) -> None:
    """Factors, domains, and where and how exactly to compute."""
    parser.add_argument("--factors", type=str, help="Factor folder, or a hub repository that holds one.")
    parser.add_argument(
        "--domains",
        type=dict[str, str] | None,
        help="Factor folders of text to protect as well: --domains.NAME FOLDER.",
    )
    parser.add_argument("--device", type=str, help="Where to compute, such as cuda; by default where the model is.")
    add_precision_option(parser)
    parser.add_argument("--force", action="store_true", help="Edit although factors are of other weights or tokens.")


def add_precision_option(parser: ArgumentParser) -> None:
    """--precision."""
    parser.add_argument("--precision", type=Literal["float64", "float32"], default="float64", help="Of the eigenbases.")


def editor_options(options: Namespace) -> dict[str, Any]:
    """Keyword arguments of ``KFACEditor`` from the options."""
    domains = {name: load_factors(path) for name, path in (options.domains or {}).items()}
    return {"domains": domains, "device": options.device, "dtype": options.precision, "force": options.force}


def base_config(options: Namespace, formulas: Sequence[str], varied: Collection[str]) -> EditConfig:
    """What all edits of a grid have in common.

    Args:
        formulas: Those of the grid.
        varied: Fields that the grid gives.

    Raises:
        InputError: Shares of a rectangle's sides without that formula.
    """
    settings: dict[str, Any] = {n: options[n] for n in EditConfig.__dataclass_fields__ if n not in varied}
    sided = settings.get("rho_G") is not None or settings.get("rho_A") is not None
    if sided and "rectangle" not in formulas:
        raise InputError("--rho_G and --rho_A are of the formula rectangle, which --formulas does not name")
    if sided:
        settings["formula"] = "rectangle"
    return EditConfig(**settings)


def open_factors(options: Namespace) -> FactorFolder:
    """The factor folder of ``--factors``."""
    if not options.factors:
        wrote = f"`{command_line('fit')}` wrote"
        raise InputError(f"--factors is missing: the folder of factors that {wrote}, such as runs/NAME/factors")
    return load_factors(options.factors)


def named_model(options: Namespace, recorded: Mapping[str, Any], where: object) -> ModelSource:
    """The model of ``--model``, or the one that a file names, with its revision, GGUF file and adapter.

    Args:
        recorded: What factors or a patch say of their model.
        where: Their folder.
    """
    given = options.revision, options.gguf_file, options.adapter
    if options.model:
        return ModelSource.named(options.model, *given, options.trust_remote_code)
    known = ModelSource.recorded(recorded, options.trust_remote_code)
    if known is None:
        raise InputError(f"--model is missing, and {where} does not say which model it belongs to")
    if any(given):
        raise InputError("--revision, --gguf_file and --adapter belong to a --model that is named")
    return known


def open_model(source: ModelSource, options: Namespace) -> nn.Module:
    """The model's weights."""
    without_loading_bar()
    if is_classifier(source):
        from lightning_kfac.modules.image_classifier import load_classifier

        return load_classifier(str(source.path))
    return load_model(source, options.dtype)


def is_classifier(source: ModelSource) -> bool:
    """Whether a folder holds a vision transformer, as the image task writes it."""
    path = source.path / "config.json"
    return path.is_file() and read_json(path, "write the checkpoint again").get("model_type") == "vit"


def note_other_tokenizer(factors: FactorFolder, fingerprint: str | None) -> None:
    """Says where the text of the factors was cut into tokens by another tokenizer than the model's."""
    known = tokenizer_of(factors)
    if known and fingerprint and known != fingerprint:
        say(
            f"{factors.path}: collected with the tokenizer {factors.metadata.get('tokenizer')} ({known[:8]}), which is "
            f"not the model's ({fingerprint[:8]}): of the same text it makes other tokens"
        )


def model_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model that is written; None where it has none that can be used (files come along anyway)."""
    try:
        return load_tokenizer(source, own_tokenizer=True)
    except InputError:
        return None


def output_folder(options: Namespace, kind: str) -> OutputFolder:
    """The folder to write: entering it refuses one that is not ours to replace.

    Args:
        kind: The command.
    """
    path = options.output
    if not path:
        raise InputError("--output is missing: the folder to write")
    folder = Path(path)
    if not folder.name or folder.name == "..":
        raise InputError(f"--output {path}: name a folder of its own")
    return OutputFolder(folder, kind, options.overwrite)


def check_not_within(path: Path, inputs: Mapping[str, str | Path | ModelSource | None]) -> None:
    """Refuses to write over what is read."""
    for name, given in inputs.items():
        source = given.path if isinstance(given, ModelSource) else given
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise InputError(f"--output {path} would replace {name} {source}; choose another --output")


def free_space_for(path: Path, n_bytes: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(place).free) < n_bytes:
        raise InputError(f"{path}: needs {n_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left; free some")


def room_for_checkpoint(output: OutputFolder, source: ModelSource) -> None:
    """The same, before the weights are read: a checkpoint takes as much as the files of its source."""
    files = {tensor.file for tensor in stored_tensors(source).values()}
    free_space_for(output.path, sum(file.stat().st_size for file in files))
