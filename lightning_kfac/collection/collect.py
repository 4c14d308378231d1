"""Collecting curvature without a Trainer: the engine of the callback, for a notebook."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.collection.sums import MomentSums
from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.targets import Blocks, resolve_targets
from lightning_kfac.models.tokens import TokenBatch

LossFunction = Callable[[nn.Module, dict], Tensor]


def collect_factors(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    blocks: Blocks = "all",
    projections: Sequence[str] = ("gate", "up", "down"),
    modules: Sequence[str] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    mc_samples: int = 1,
    loss_fn: LossFunction | None = None,
    max_memory_gb: float | None = None,
    layers_per_pass: int | None = None,
    verbose: bool = False,
) -> dict[str, KroneckerFactors]:
    """Collects the Kronecker factors of a causal language model, or of any model with a loss of your own.

    The model is used in eval mode and without trainable parameters, and left as it was found.

    Args:
        model: A Hugging Face causal language model, float32 or bfloat16.
        batches: Dicts with ``input_ids`` [B, T] and optionally ``attention_mask`` [B, T], ``labels``
            [B, T] (Hugging Face convention; -100 is ignored) and ``sample_index`` [B]. Several passes
            need something that can be iterated more than once.
        blocks: Block indices (negative from the end) or ``all``.
        projections: Any of gate, up, down, q, k, v, o.
        modules: Instead of both: regular expressions on dotted names.
        labels: ``sampled`` (true Fisher) or ``gold`` (empirical Fisher).
        seed: Keys the sampled labels.
        mc_samples: Draws of labels a forward pass.
        loss_fn: For other models: maps (model, batch) to the SUM of the batch's losses. Batches are then
            passed on as they are; an ``attention_mask`` masks layers whose input has its shape.
        max_memory_gb: Cap on memory beside the weights; text is read in several passes if it must be.
        layers_per_pass: Fixes the number of projections a pass.
        verbose: Print the memory plan.

    Returns:
        Factors by dotted layer name. They do not depend on how rows are batched, padded or passed.

    Raises:
        InputError: A target does not exist, no token is valid, a value is not finite, or nothing fits
            into the memory.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> model = load_model("demo")
        >>> rows = torch.arange(1, 65).view(2, 32)
        >>> factors = collect_factors(model, [{"input_ids": rows}], blocks=[3], projections=["up"])
        >>> {name: (f.shape, f.n_tokens) for name, f in factors.items()}
        {'model.layers.3.mlp.up_proj': ((512, 128), 62)}
    """
    layers = resolve_targets(model, blocks, projections, modules)
    with frozen(model):
        if loss_fn is not None:
            return _collect_with(loss_fn, model, batches, layers)
        loss = FisherLoss(labels, seed, mc_samples)
        first, batches = _peek(batches)
        if first is None:
            raise InputError("no valid token: there is no batch")
        rows, seq_len = TokenBatch.from_dict(first).input_ids.shape
        plan = plan_memory(model, layers, loss, rows, seq_len, max_memory_gb, layers_per_pass)
        if verbose:
            console.print(str(plan))
        if len(plan.passes) > 1 and isinstance(batches, Iterator):
            raise InputError(f"{len(plan.passes)} passes are needed: give `batches` as a list or a data loader")
        factors = {}
        for names in plan.passes:
            with CurvatureCapture({name: layers[name] for name in names}) as capture:
                engine = CurvatureEngine(model, capture, loss, plan.rows_at_once, plan.head_chunk)
                _run(engine, batches)
                factors |= capture.factors(mc_samples)
        return factors


def collect_moments(
    model: nn.Module,
    batches: Iterable[dict],
    factors: Mapping[str, KroneckerFactors],
    *,
    moments: str = "token",
    labels: str = "sampled",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measures the curvature of every component in the basis of given factors, in a second pass (EK-FAC).

    K-FAC takes lambda_i mu_j for the curvature along component (i, j); EK-FAC (George et al., 2018)
    measures it.

    Args:
        model, batches, labels, seed: As for ``collect_factors``.
        factors: By dotted layer name; their eigenbases are used.
        moments: ``token``: E_t[(u_i^T g_t)^2 (v_j^T a_t)^2]. ``sequence``: the squared gradient of each
            row, summed over its tokens; also divided by the number of tokens.

    Returns:
        float32 [d_out, d_in] by dotted layer name, eigenvectors in descending order.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> model, rows = load_model("demo"), [{"input_ids": torch.arange(1, 257).view(2, 128)}]
        >>> factors = collect_factors(model, rows, blocks=[3], projections=["up"])
        >>> {name: tuple(m.shape) for name, m in collect_moments(model, rows, factors).items()}
        {'model.layers.3.mlp.up_proj': (512, 128)}
    """
    if moments not in ("token", "sequence"):
        raise InputError(f"moments is {moments!r}; choose token or sequence")
    named = dict(model.named_modules())
    if missing := [name for name in factors if name not in named]:
        raise InputError(f"the factors are of another model: it has no layer {missing[0]}")
    layers = {name: named[name] for name in factors}

    bases = BasisCache.beside(factors)

    def sums(name: str, layer: nn.Module) -> MomentSums:
        return MomentSums(layer, *bases.of(factors, name, layer.weight.device), moments)

    with frozen(model), CurvatureCapture(layers, sums) as capture:
        loss = FisherLoss(labels, seed)
        first, batches = _peek(batches)
        plan = plan_memory(model, layers, loss, *TokenBatch.from_dict(first or {}).input_ids.shape)
        _run(CurvatureEngine(model, capture, loss, plan.rows_at_once, plan.head_chunk), batches)
        counts = capture.n_tokens()
        return {name: s.total / counts[name] for name, s in capture.sums.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode without trainable parameters, and back."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _run(engine: CurvatureEngine, batches: Iterable[dict]) -> None:
    device = next(engine.model.parameters()).device
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    rows = 0
    for number, batch in enumerate(batches):
        tokens = engine.loss.prepare(batch, first_index=rows)
        rows += len(tokens.input_ids)
        if batch["input_ids"].is_cpu and (largest := int(batch["input_ids"].max())) >= vocabulary:
            raise InputError(f"batch {number}: id {largest} is outside the model's vocabulary (0 to {vocabulary - 1})")
        last, total = engine.run(tokens.to(device))
        last.backward()
        engine.capture.check_finite(total, f"batch {number}")


def _collect_with(
    loss_fn: LossFunction, model: nn.Module, batches: Iterable[dict], layers: Mapping[str, nn.Module]
) -> dict[str, KroneckerFactors]:
    with torch.enable_grad(), CurvatureCapture(layers, per_position_masks=True) as capture:
        for number, batch in enumerate(batches):
            mask = batch.get("attention_mask")
            capture.begin(None if mask is None else mask.bool())
            loss = loss_fn(model, batch)
            loss.backward()
            capture.check_finite(loss, f"batch {number}")
        return capture.factors()


def _peek(batches: Iterable[dict]) -> tuple[dict | None, Iterable[dict]]:
    """The first batch, and all of them; an iterator is put together again."""
    if not isinstance(batches, Iterator):
        return next(iter(batches), None), batches
    first = next(batches, None)

    def again() -> Iterator[dict]:
        if first is not None:
            yield first
        yield from batches

    return first, again()
