"""Collecting curvature without a Trainer: the engine of the callback, for a notebook."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_kfac.collection.capture import CurvatureCapture, Trial
from lightning_kfac.collection.fisher import FisherLoss, LabelSource
from lightning_kfac.collection.leftovers import without_leftover_gradients
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.collection.sums import FactorSums, LayerSums, MomentSums, ResultT
from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.choices import Blocks, Projections
from lightning_kfac.models.language import vocabulary_size
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.models.tokens import TokenBatch

T = TypeVar("T")
Batches = Iterable[Mapping[str, Any]]
# The batch is what the caller's own function takes.
LossFunction = Callable[[nn.Module, Any], Tensor]


def collect_factors(
    model: nn.Module,
    batches: Batches,
    *,
    blocks: Blocks = "all",
    projections: Projections | None = None,
    modules: Sequence[str] | None = None,
    labels: LabelSource = "sampled",
    seed: int = 0,
    mc_samples: int = 1,
    loss_fn: LossFunction | None = None,
    max_memory_gb: float | None = None,
    layers_per_pass: int | None = None,
    coupled: bool = False,
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
        projections: Any of gate, up, down, q, k, v, o; of experts expert_gate, expert_up, expert_down, and shared_gate,
            shared_up, shared_down of one that every token goes through. By default gate, up, down, of them
            those that there are.
        modules: Instead of both: regular expressions on dotted names.
        labels: ``sampled`` (true Fisher) or ``gold`` (empirical Fisher).
        seed: Keys the sampled labels.
        mc_samples: Draws of labels a forward pass.
        loss_fn: For other models: maps (model, batch) to the SUM of the batch's losses. Batches are then
            passed on as they are; an ``attention_mask`` masks layers whose input has its shape.
        max_memory_gb: Cap on memory beside the weights; text is read in several passes if it must be.
        layers_per_pass: Fixes the number of projections a pass.
        coupled: Also collect ``A_coupled`` and ``G_coupled``, in the same pass: for the formulas ``coupled``,
            ``coupled_modified`` and ``output_side``.
        verbose: Print the memory plan.

    Returns:
        Factors by dotted layer name, in host memory. They do not depend on how rows are batched, padded or passed.

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
            return _collect_with(loss_fn, model, batches, layers, coupled)
        objective = FisherLoss(labels, seed, mc_samples)
        session = CollectionSession(
            model,
            layers,
            objective,
            max_memory_gb=max_memory_gb,
            layers_per_pass=layers_per_pass,
            coupled=coupled,
        )
        batches = planned(session, batches)
        passes = session.plan.passes
        if verbose:
            console.print(str(session.plan))
        if len(passes) > 1 and isinstance(batches, Iterator):
            raise InputError(f"{len(passes)} passes are needed: give `batches` as a list or a data loader")
        factors: dict[str, KroneckerFactors] = {}
        for names in passes:
            factors |= _pass(session, objective, batches, names, partial(FactorSums, coupled=coupled))
        return factors


def collect_moments(
    model: nn.Module,
    batches: Batches,
    factors: Mapping[str, KroneckerFactors],
    *,
    moments: Literal["token", "sequence"] = "token",
    labels: LabelSource = "sampled",
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
    known = find_layers(model)
    if missing := [name for name in factors if name not in known]:
        raise InputError(f"the factors are of another model: it has no layer {missing[0]}")
    bases = BasisCache.beside(factors)

    def sums(layer: Layer) -> MomentSums:
        return MomentSums(layer, *bases.of(factors, layer.name, layer.device), moments)

    with frozen(model):
        layers = {name: known[name] for name in factors}
        objective = FisherLoss(labels, seed)
        session = CollectionSession(model, layers, objective)
        return _pass(session, objective, planned(session, batches), layers, sums)


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


def planned(session: CollectionSession[TokenBatch], batches: Batches) -> Batches:
    """Plans by the first batch; gives all of them."""
    first, everything = _peek(batches)
    if first is None:
        raise InputError("no valid token: there is no batch")
    session.make_plan(TokenBatch.from_dict(first).shape)
    return everything


def _pass(
    session: CollectionSession[TokenBatch],
    objective: FisherLoss,
    batches: Batches,
    names: Iterable[str],
    sums: Callable[[Layer], LayerSums[ResultT]],
) -> dict[str, ResultT]:
    """One pass over the batches for some of the layers."""
    device = next(session.model.parameters()).device
    vocabulary = vocabulary_size(session.model)
    rows = 0
    try:
        session.open(names, sums)
        for number, batch in enumerate(batches):
            tokens = objective.prepare(batch, first_index=rows)
            rows += tokens.shape[0]
            try:
                tokens.check_ids(vocabulary)
            except InputError as error:
                raise InputError(f"batch {number}: {error}") from None
            session.run(tokens.to(device)).backward()
            session.check_finite(f"batch {number}")
        return session.close()
    finally:
        session.abandon()


def _collect_with(
    loss_fn: LossFunction, model: nn.Module, batches: Batches, layers: Mapping[str, Layer], coupled: bool
) -> dict[str, KroneckerFactors]:
    first, batches = _peek(batches)
    if first is None:
        raise InputError("there is no batch")
    with torch.enable_grad(), without_leftover_gradients(model):
        with Trial(layers) as trial:
            loss_fn(model, first)
            uses = trial.uses()
        sums = partial(FactorSums, coupled=coupled)
        with CurvatureCapture(layers, sums, uses, per_position_masks=True) as capture:
            for number, batch in enumerate(batches):
                mask = batch.get("attention_mask")
                capture.begin(None if mask is None else mask.bool())
                loss = loss_fn(model, batch)
                loss.backward()
                capture.check_finite(loss, f"batch {number}")
            return capture.results()


def _peek(batches: Iterable[T]) -> tuple[T | None, Iterable[T]]:
    """The first batch, and all of them; an iterator is put together again."""
    if not isinstance(batches, Iterator):
        return next(iter(batches), None), batches
    first = next(batches, None)

    def again() -> Iterator[T]:
        if first is not None:
            yield first
        yield from batches

    return first, again()
