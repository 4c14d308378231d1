"""Compute on paper whether a collection fits a machine, how long it takes, and the command that starts it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.cli.figures_out import RETURNED
from lightning_kfac.cli.shipped import find_config
from lightning_kfac.console import command_line, console, show
from lightning_kfac.errors import InputError
from lightning_kfac.models.choices import Blocks, Projections
from lightning_kfac.models.dtypes import Dtype
from lightning_kfac.planning.hardware import HARDWARE, Hardware, Strategy
from lightning_kfac.planning.shapes import SHAPES

if TYPE_CHECKING:
    from lightning_kfac.planning.request import Request
    from lightning_kfac.planning.run import RunPlan

FIGURES = RETURNED


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--train_config", type=str, help="A config of fit; the options below override it.")
    parser.add_argument("--model", type=str, help="Instead: hub name, folder, or demo. No weights are read.")
    parser.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    parser.add_argument("--gguf_file", type=str | None, help="A GGUF file in the model's folder or repository.")
    parser.add_argument("--shape", type=str, help=f"Instead, without a network: {', '.join(SHAPES)}.")
    parser.add_argument("--dtype", type=Dtype | None, help="Of the weights. (default: the model's own)")
    parser.add_argument("--tokens", type=int | None, help="Tokens of text, over all devices.")
    parser.add_argument("--seq_len", type=int | None, help="Tokens a row. (default: 512)")
    parser.add_argument("--batch_size", type=int | None, help="Rows of one device's batch. (default: 8)")
    parser.add_argument("--blocks", type=Blocks | None, help="Block numbers. (default: all)")
    parser.add_argument("--projections", type=Projections | None, help="Of gate, up, down, q, k, v, o, ...")
    parser.add_argument("--modules", type=list[str] | None, help="Instead: regular expressions on layer names.")
    parser.add_argument("--coupled", type=bool | None, help="Whether coupled factors are collected too.")
    parser.add_argument("--hardware", type=str, default="h100", help=f"One of {', '.join(HARDWARE)}.")
    parser.add_argument("--devices", type=int, default=1, help="Of one node.")
    parser.add_argument("--nodes", type=int, default=1, help="Number of nodes.")
    parser.add_argument("--strategy", type=Strategy, default="auto", help="auto is the fastest that fits.")
    parser.add_argument("--memory_gb", type=float | None, help="Override: memory of one device, 10^9 bytes.")
    parser.add_argument("--peak_tflops", type=float | None, help="Override: peak of matrix products.")
    parser.add_argument("--efficiency", type=float | None, help="Override: share of the peak that is reached.")
    parser.add_argument("--link_gb", type=float | None, help="Override: GB/s between devices of a node.")
    parser.add_argument("--network_gb", type=float | None, help="Override: GB/s between nodes, for each device.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Let the model's repository run its code.")


def run(options: Namespace) -> dict[str, Any]:
    """Prints; returns the figures."""
    # Here, because the options need neither torch nor transformers.
    from lightning_kfac.planning.request import hardware_of, read_request
    from lightning_kfac.planning.run import plan_run
    from lightning_kfac.planning.tables import disk_table, memory_table, readable_parameters, time_table

    for name in ("devices", "nodes"):
        if options[name] < 1:
            raise InputError(f"--{name} is {options[name]}; it must be at least 1")
    if sum(bool(options[name]) for name in ("train_config", "model", "shape")) != 1:
        raise InputError("say which model: one of --train_config, --model or --shape")
    hardware = hardware_of(options.as_dict())
    ranks = options.devices * options.nodes
    config = Path(find_config(options.train_config)) if options.train_config else None
    request = read_request(options.as_dict(), config)
    model = request.model
    job = request.job
    plan = plan_run(model, job, hardware, ranks, options.devices, options.strategy)
    many = f"{ranks} x {options.hardware}" + (f" on {options.nodes} nodes" if options.nodes > 1 else "")
    console.print(
        f"{request.title}: {readable_parameters(model.parameters)}, {len(job.tracked)} projections, "
        f"{job.tokens:,} tokens, on {many}. Computed, not measured; rates: lightning_kfac/planning/hardware.py."
    )
    for note in request.notes:
        console.print(note)
    figures = {"model": request.title, "fits": plan.fits, **asdict(plan)}
    show(memory_table(plan))
    if not plan.fits:
        _say_what_would_fit(request, hardware)
        return figures
    for table in (time_table(plan), disk_table(plan)):
        show(table)
    told = {"auto": "one device", "ddp": "ddp: every rank has all weights", "fsdp": "fsdp: weights and factors sharded"}
    console.print(f"strategy: {told[plan.strategy]}. On {'each node' if options.nodes > 1 else 'the machine'}:")
    console.print(f"  {_command(request, options, plan)}")
    return figures


def _say_what_would_fit(request: "Request", hardware: Hardware) -> None:
    from lightning_kfac.planning.run import MOST_DEVICES, fewest_devices

    found = fewest_devices(request.model, request.job, hardware)
    hint = f"with --strategy auto it fits on {found} of these devices (only powers of two were tried)"
    if found is None:
        hint = f"{MOST_DEVICES:,} of these devices are too few; choose fewer layers or devices with more memory"
        if request.job.most_memory is not None:
            hint += ", or raise collect.max_memory_gb"
    least = "one projection" if request.job.layers_per_pass is None else f"{request.job.layers_per_pass} projections"
    console.print(f"does not fit, even with one row at once and {least} a pass: {hint}.")


def _command(request: "Request", options: Namespace, plan: "RunPlan") -> str:
    """The command that starts what was planned."""
    settings: dict[str, Any] = {"config": options.train_config}
    if not options.train_config:
        settings = {"model.model_name": request.title, "data.corpus": "TEXT"}
    settings |= request.given | {"trainer.devices": options.devices}
    launcher: list[object] = []
    if options.nodes > 1:
        settings["trainer.num_nodes"] = options.nodes
        launcher = ["torchrun", "--nnodes", options.nodes, "--nproc-per-node", options.devices, "--rdzv-backend",
                    "c10d", "--rdzv-endpoint", "FIRST_NODE:29500", "--rdzv-id", "collect"]  # fmt: skip
    if plan.ranks > 1:
        settings["trainer.strategy"] = plan.strategy
    if options.hardware == "cpu":
        settings["trainer.accelerator"] = "cpu"
    words = [word for name, value in settings.items() for word in (f"--{name}", _word(value))]
    return command_line("fit", *words, launcher=launcher)


def _word(value: object) -> str:
    """As it is written on a command line."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
