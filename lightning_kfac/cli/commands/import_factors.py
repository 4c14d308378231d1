"""Convert the factors of another tool into a factor folder."""

from collections.abc import Mapping
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.options import check_not_within, output_folder
from lightning_kfac.console import console, counted
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import save_factors
from lightning_kfac.factors.foreign.read import Kind, read_foreign
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.loading import load_config, skeleton
from lightning_kfac.models.source import ModelSource


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--source", type=str, required=True, help="File or folder of the other tool.")
    parser.add_argument("--output", type=str, required=True, help="Factor folder to write.")
    parser.add_argument("--kind", type=Kind, default="auto", help="Which tool; auto looks at the files.")
    parser.add_argument("--n_tokens", type=int | None, help="Number of tokens with a loss, where the files do not say.")
    parser.add_argument(
        "--layer_pattern",
        type=str,
        default="model.layers.{block}.mlp.{projection}_proj",
        help="Dotted name of a layer in the model.",
    )
    parser.add_argument("--model", type=str | None, help="The model they belong to: names and shapes are checked.")
    parser.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier factor folder.")


def run(options: Namespace) -> None:
    """Reads, checks and writes."""
    check_not_within(Path(options.output), {"the source": options.source})
    with output_folder(options, "import") as output:
        console.print(f"convert {options.source} to {output.path}")
        factors, metadata = read_foreign(options.source, options.kind, options.n_tokens, options.layer_pattern)
        if options.model:
            _check_layers(options.model, options.revision, factors)
            metadata = metadata | ModelSource.named(options.model, options.revision).about()
        save_factors(factors, output.new, metadata)
    console.print(f"{counted(len(factors), 'layer')} from {metadata['imported_from']} -> {output.path}/")
    console.print(f"note: {metadata['notes']}")


def _check_layers(model: str, revision: str | None, factors: Mapping[str, KroneckerFactors]) -> None:
    layers = find_layers(skeleton(load_config(model, revision=revision)))
    for name, layer in factors.items():
        if name not in layers:
            raise InputError(f"{model} has no layer {name}; --layer_pattern says how its layers are named")
        if (shape := layers[name].shape) != layer.shape:
            raise InputError(f"{name}: the factors are for {layer.shape}, the weight of {model} is {shape}")
