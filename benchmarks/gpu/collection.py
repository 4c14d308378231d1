"""(b) Collection at the shape of OLMo-2 7B: tokens a second, share of the limit, memory, where the time goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.conventional import conventional_factors
from benchmarks.gpu.parts import Part, product_rate, random_model, random_rows
from benchmarks.with_kronfluence import kronfluence_available, kronfluence_factors, prepare
from lightning_kfac.collection.fisher import FisherLoss, LabelSource
from lightning_kfac.collection.memory import USABLE
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning.architecture import read_architecture
from lightning_kfac.planning.cost import token_flops

PROJECTIONS = ("gate", "up", "down")
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "vocab_size": 100352}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 512}  # fmt: skip
# Names of kernels tell what they do.
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitk", "::mm", "addmm", "bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "copies": ("memcpy", "copy", "memset", "cat"),
    "sums and softmax": ("reduce", "softmax", "scan", "norm"),
    "compiled": ("triton",),
    "element-wise": ("elementwise", "vectorized", "index", "scatter", "gather", "foreach"),
}


def run(part: Part) -> None:
    """All steps."""
    small = part.small
    size = 256 if small else 8192
    limit = part.step("limit", lambda: {"bfloat16": product_rate(part, torch.bfloat16, size),
                                        "float32": product_rate(part, torch.float32, size)})  # fmt: skip
    model = random_model("olmo2", SMALL if small else SHAPE, part.device, torch.bfloat16)
    rows = 4 if small else 32
    batch = random_rows(model.config.vocab_size, rows, 32 if small else 512, part.device)
    jobs = {"three blocks": [1, 2, 3] if small else [23, 24, 25], "all blocks": list(range(len(model.model.layers)))}
    rate = (limit or {}).get("bfloat16", float("nan"))
    all_blocks = jobs["all blocks"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = USABLE * (80e9 - weights) / 1e9  # beside the weights of a card of 80 GB
    for name, blocks in jobs.items():
        part.step(f"{name}: ours", lambda blocks=blocks: ours(part, model, batch, blocks, rate))
        part.step(f"{name}: profile", lambda blocks=blocks: profile(part, model, batch, blocks))
    part.step("all blocks: on 80 GB", lambda: ours(part, model, batch, all_blocks, rate, room))
    part.step("three blocks: conventional", lambda: conventional(part, model, batch, jobs["three blocks"]))
    part.step("all blocks: conventional, one pass", lambda: conventional(part, model, batch, all_blocks[-2:]))
    part.step("settling", lambda: settling(part))
    for name, blocks in jobs.items():
        if not small:  # compiling for a CPU takes minutes
            part.step(f"{name}: compiled", lambda blocks=blocks: compiled(part, model, batch, blocks, rate))
    part.step("all blocks: into host memory", lambda: closing(part, model, batch, all_blocks))
    if kronfluence_available():
        part.step("three blocks: kronfluence", lambda: kronfluence(part, model, batch, jobs["three blocks"]))


def positions(batch: dict[str, torch.Tensor]) -> int:
    """That count in a batch of whole rows."""
    rows, seq_len = batch["input_ids"].shape
    return rows * (seq_len - 1)


@contextmanager
def collecting(
    model: nn.Module,
    batch: dict,
    blocks: list[int],
    labels: LabelSource = "gold",
    projections: tuple[str, ...] = PROJECTIONS,
    compiled: bool = False,
    max_memory_gb: float | None = None,
) -> Iterator[tuple[CollectionSession, Callable[[], None]]]:
    """The first pass of a collection, and what does one batch of it; its sums are thrown away."""
    objective = FisherLoss(labels)
    layers = resolve_targets(model, blocks, projections)
    session = CollectionSession(model, layers, objective, max_memory_gb=max_memory_gb, compiled=compiled)
    session.make_plan(tuple(batch["input_ids"].shape))
    device = batch["input_ids"].device

    def step() -> None:
        session.run(objective.prepare(batch).to(device)).backward()
        session.check_finite("benchmark")

    try:
        session.open(session.plan.passes[0])
        yield session, step
    finally:
        session.abandon()


def ours(
    part: Part, model: nn.Module, batch: dict, blocks: list[int], rate: float, max_memory_gb: float | None = None
) -> dict[str, Any]:
    """Tokens a second with gold and with sampled labels, and memory beside what was planned."""
    layers = resolve_targets(model, blocks, PROJECTIONS)
    paper = read_architecture(model)
    flops = token_flops(paper, paper.select(layers), batch["input_ids"].shape[1])
    found: dict[str, Any] = {"flops_per_token": flops._asdict()}

    def three_batches() -> None:
        with collecting(model, batch, blocks, max_memory_gb=max_memory_gb) as (session, step):
            plan = session.plan
            for _ in range(3):
                step()
        planned = plan.factor_bytes + plan.activation_bytes + plan.head_bytes
        found.update(plan=str(plan), passes=len(plan.passes), rows_at_once=plan.rows_at_once, planned_gb=planned / 1e9)

    found["peak_gb"] = part.peak(three_batches) / 1e9
    for labels in ("gold", "sampled"):
        part.free()
        with collecting(model, batch, blocks, labels, max_memory_gb=max_memory_gb) as (session, step):
            found[labels] = rates(part, batch, part.median(step), sum(flops), rate)
            found[labels]["rows_at_once"] = session.plan.rows_at_once
    return found


def rates(part: Part, batch: dict, seconds: float, flops: float, limit: float) -> dict[str, float]:
    """Of one batch."""
    per_second = positions(batch) / seconds
    return {"tokens_per_second": per_second, "seconds_a_batch": seconds, "of_the_limit": flops * per_second / limit}


def closing(part: Part, model: nn.Module, batch: dict, blocks: list[int]) -> dict[str, float]:
    """How long it takes until the factors are in host memory."""
    with collecting(model, batch, blocks) as (session, step):
        step()
        seconds = part.seconds(session.close)
    return {"seconds": seconds}


def profile(part: Part, model: nn.Module, batch: dict, blocks: list[int]) -> dict[str, Any]:
    """Where the time of one batch goes."""
    with collecting(model, batch, blocks, "sampled") as (_, step):
        step()
        return kinds_of_kernels(part, step)


def kinds_of_kernels(part: Part, step: Callable[[], None]) -> dict[str, Any]:
    """Share of the time in which the device was busy; of that, shares by kind of kernel, and the longest ones."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CUDA if part.device == "cuda" else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = part.seconds(step)
    names = {event.key: _time(event, part.device) / 1e6 for event in profiler.key_averages()}
    busy = sum(names.values())
    kinds: dict[str, float] = {}
    for name, spent in names.items():
        kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + spent / busy
    longest = sorted(names.items(), key=lambda pair: -pair[1])[:30]
    return {
        "busy": busy / seconds,
        "kinds": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "longest": {name[:110]: round(spent / busy, 4) for name, spent in longest},
    }


def _time(event: Any, device: str) -> float:
    return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "other")


def conventional(part: Part, model: nn.Module, batch: dict, blocks: list[int]) -> dict[str, Any]:
    """Two blocks a pass, half of the rows at a time."""
    half = max(1, len(batch["input_ids"]) // 2)
    parts = [{"input_ids": rows} for rows in batch["input_ids"].split(half)]

    def once() -> None:
        conventional_factors(model, parts, blocks, PROJECTIONS, blocks_per_pass=2)

    try:
        seconds = part.median(once, repeats=2)
        peak = part.peak(once)
    finally:
        model.get_input_embeddings()._forward_hooks.clear()  # which checkpointing has left
        model.eval().requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"][:1, :2])
    per_second = positions(batch) / seconds
    return {"tokens_per_second": per_second, "peak_gb": peak / 1e9, "left_hooks": embedded.requires_grad}


def compiled(part: Part, model: nn.Module, batch: dict, blocks: list[int], rate: float) -> dict[str, Any]:
    """What compiling between the tracked layers brings, and what it costs at first."""
    layers = resolve_targets(model, blocks, PROJECTIONS)
    paper = read_architecture(model)
    flops = sum(token_flops(paper, paper.select(layers), batch["input_ids"].shape[1]))
    with collecting(model, batch, blocks, "sampled", compiled=True) as (_, step):
        first = part.seconds(step)
        return {"first_s": first, **rates(part, batch, part.median(step), flops, rate)}


def kronfluence(part: Part, model: nn.Module, batch: dict, blocks: list[int]) -> dict[str, Any]:
    """The same factors, half of the rows at a time. It replaces layers of the model, so it comes last."""
    names = [f"model.layers.{b}.mlp.{p}_proj" for b in blocks for p in PROJECTIONS]
    half = max(1, len(batch["input_ids"]) // 2)
    parts = [{"input_ids": rows} for rows in batch["input_ids"].split(half)]
    wrapped, task = prepare(model, names)

    def once() -> None:
        kronfluence_factors(wrapped, task, parts, torch.bfloat16)

    return {"tokens_per_second": positions(batch) / part.median(once, repeats=2), "peak_gb": part.peak(once) / 1e9}


def settling(part: Part) -> dict[str, Any]:
    """How long the sums of 64 batches take into the second accumulator, and single panels in other ways."""
    size = 300 if part.small else 11008
    moment = SecondMoment(size, part.device)
    x = torch.randn(64, size, device=part.device, dtype=torch.bfloat16)
    moment.add(x)
    moment._settle()
    bytes_ = sum(panel.numel() * 4 for panel in moment._recent)
    found = {"bytes": bytes_, "settle_s": part.median(moment._settle, repeats=3)}
    panels = moment._recent
    found["copy_s"] = part.median(lambda: [panel.cpu() for panel in panels], repeats=3)
    if part.device == "cuda":
        pinned = torch.empty(max(panel.numel() for panel in panels), pin_memory=True)
        found["copy_pinned_s"] = part.median(
            lambda: [pinned[: panel.numel()].view_as(panel).copy_(panel) for panel in panels], repeats=3
        )
    host = [panel.cpu() for panel in panels]
    found["add_s"] = part.median(lambda: [a.add_(b) for a, b in zip(host, host, strict=True)], repeats=3)
    ways: dict[str, Callable[[torch.Tensor], Any]] = {"x 16384 rows": moment.add}
    wide = torch.randn(64 if part.small else 16384, size, device=part.device, dtype=torch.bfloat16)
    flops = len(wide) * sum(2 * panel.numel() for panel in panels)
    found |= {name: flops / part.median(lambda way=way: way(wide), repeats=5) for name, way in ways.items()}
    return found
