"""Capturing A and G: hooks on the tracked layers while a summed loss is differentiated.

Every layer is z[b, t] = W a[b, t]. A sums a a^T and G sums g g^T over the positions that count, with
g = d loss / d z ("K-FAC expand": each position counts as a sample of its own).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_kfac.collection.sums import FactorSums, LayerSums
from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.layers import Layer


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (input, output gradient) to the layer's sums.

    ``root`` is a leaf that requires grad and receives none. Through it the graph begins at the lowest
    tracked output, although no parameter is trainable: nothing below is stored or differentiated.
    """

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, root: Tensor, a: Tensor, capture: "CurvatureCapture", name: str) -> Tensor:
        ctx.save_for_backward(a)
        ctx.capture = capture
        ctx.name = name
        ctx.first_draw = True
        if output._is_view():  # GPT-2's Conv1D ends in a view
            return output.view_as(output)
        ctx.mark_dirty(output)  # no view, so that a model may add to it in place, as Falcon does
        return output

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (a,) = ctx.saved_tensors
        ctx.capture.add(ctx.name, a, gradient, ctx.first_draw)
        ctx.first_draw = False
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None, None


class CurvatureCapture:
    """Hooks on some layers of a model that sum curvature over batches.

    Usage: enter the context; for each batch call ``begin``, run the model, and call ``backward()`` on
    each summed loss; then take ``results()``. Hooks do nothing where gradients are disabled, so the
    model can be evaluated in between. The model's parameters must not require grad.

    Args:
        layers: The tracked layers by name.
        sums: Makes the sums of a layer; by default those of A and G.
        leaders: For each layer the one that reads the same input and comes first in a forward, itself where there is
            none; by default found in the first forward. (Layers that are not tracked here may be in it.)
        per_position_masks: Leave layers unmasked whose input is not one vector a position, instead of
            refusing them: for models other than language models.
        ranks: Processes that add to the same sums at every batch, each of which one of them keeps.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sums: Callable[[Layer], LayerSums[Any]] = FactorSums,
        leaders: Mapping[str, str] | None = None,
        per_position_masks: bool = False,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.layers = dict(layers)
        self.per_position_masks = per_position_masks
        self.sums = {name: sums(layer) for name, layer in self.layers.items()}
        device = next(iter(self.layers.values())).device
        self.root = torch.zeros((), requires_grad=True, device=device)
        # On the device, so that no batch waits for it.
        self.counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in self.layers}
        self.leaders: dict[str, str] = {}
        self._valid: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name, leader in leaders_among(self.layers, leaders or {}).items():
            self._follow(name, leader)

    def begin(self, valid: Tensor | None) -> None:
        """Starts a batch.

        Args:
            valid: bool [B, T], the positions that count; None if all do.
        """
        self._valid = valid
        self._inputs.clear()

    def add(self, name: str, a: Tensor, g: Tensor, first_draw: bool) -> None:
        """Adds what one layer saw, without the positions that do not count."""
        a = self.layers[name].inputs(a)
        g = self.layers[name].outputs(g)
        valid = self._valid
        if valid is not None and a[..., 0].numel() != valid.numel():
            if not self.per_position_masks:
                raise InputError(
                    f"{name} has an input of shape {list(a.shape)}, not one vector for each of "
                    f"{list(valid.shape)} rows and positions; leave it out"
                )
            valid = None
        if valid is not None:
            dropped = ~valid.reshape(a.shape[:-1])[..., None]  # some models flatten rows and positions
            a = a.masked_fill(dropped, 0)
            g = g.masked_fill(dropped, 0)
        self.sums[name].add(a, g, first_draw)
        if first_draw:
            self.counts[name] += a[..., 0].numel() if valid is None else valid.sum()

    def __enter__(self) -> "CurvatureCapture":
        for name, layer in self.layers.items():
            self._handles.append(layer.watch(self._see(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def check_finite(self, loss: Tensor, where: str) -> None:
        """Raises ``InputError`` naming the first layer whose sums are no longer finite.

        The one place that waits for the device; call it after the batch's backward.
        """
        traces = [trace for sums in self.sums.values() for trace in sums.trace().values()]
        fine = bool(torch.stack([loss.detach().to(traces[0]), *traces]).isfinite().all())
        found = [bad for bad in self.ranks.gather(None if fine else self._not_finite()) if bad is not None]
        if found:
            bad = {what: set().union(*(one[what] for one in found)) for what in ("input", "gradient")}
            message = _where_it_began(list(self.sums), bad["input"], bad["gradient"])
            raise InputError(f"{where}: {message}; try dtype float32, or look at the model's weights")

    def n_tokens(self) -> dict[str, int]:
        """Positions that counted so far, by layer."""
        return {name: int(count) for name, count in self.counts.items()}

    def results(self, draws: int = 1) -> dict[str, Any]:
        """What the sums give, by layer: ``KroneckerFactors``, or moments. The capture ends; its sums go one by one.

        Args:
            draws: Draws of labels a forward pass.

        Raises:
            InputError: No position counted, or a layer was never run.
        """
        counts = self.n_tokens()
        if not any(counts.values()):
            raise InputError("no valid token: every position is padding, ignored, or without a next token")
        if idle := [name for name in self.layers if name not in self.leaders]:
            raise InputError(f"{idle[0]} was never run; leave it out")
        found: dict[str, Any] = {}
        for name, leader in self.leaders.items():  # leaders come first, as they did in the forward
            found[name] = self.sums.pop(name).result(counts[name], draws, found.get(leader))
        return {name: found[name] for name in self.layers}

    def snapshot(self, add_over_ranks: Callable[[Tensor], Tensor], draws: int = 1) -> dict[str, KroneckerFactors]:
        """The factors so far, of all ranks; collection goes on."""
        copy = CurvatureCapture(self.layers, leaders=self.leaders)
        copy.counts = dict(self.counts)
        for name, sums in self.sums.items():
            copy.sums[name].load(sums.tensors())
        copy.reduce(add_over_ranks)
        return copy.results(draws)

    def state(self) -> dict[str, Tensor]:
        """Sums and counts of this rank by ``layer/part``, for ``load_state``."""
        state = {f"{name}/{key}": value for name, sums in self.sums.items() for key, value in sums.state().items()}
        return state | {f"{name}/count": count for name, count in self.counts.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what ``state`` gave, bit for bit; the leaders must be those of the capture that gave it."""
        for name, sums in self.sums.items():
            sums.load_state(_parts(state, name))
        for name, count in self.counts.items():
            count.copy_(state[f"{name}/count"])

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Adds the sums of another capture of these layers to this one's, equal to rounding."""
        for name, sums in self.sums.items():
            if not (parts := _parts(state, name)):
                continue
            before = [tensor.clone() for tensor in sums.tensors()]
            sums.load_state(parts)
            sums.load([old + new for old, new in zip(before, sums.tensors(), strict=True)])
        for name, count in self.counts.items():
            count += state[f"{name}/count"].to(count.device)

    def reduce(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of all ranks; only triangles travel.

        Args:
            add_over_ranks: Sum all-reduce of a tensor.
        """
        for name, sums in self.sums.items():
            if self.ranks.size == 1:  # else they are sums over ranks already
                sums.load([add_over_ranks(tensor) for tensor in sums.tensors()])
            self.counts[name] = add_over_ranks(self.counts[name])

    def _see(self, name: str) -> Callable[[Tensor, Tensor], Tensor | None]:
        def see(a: Tensor, z: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self._note_input(name, a)
            return Tap.apply(z, self.root, a.detach(), self, name)

        return see

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def _note_input(self, name: str, a: Tensor) -> None:
        """Notes in the first forward which layers read the same tensor, unless that is known; later ones must agree."""
        if name not in self.leaders:
            self._follow(name, next((other for other, seen in self._inputs.items() if seen is a), name))
        elif (leader := self.leaders[name]) != name and self._inputs.get(leader) is not a:
            raise InputError(f"{name} shared its input with {leader} in the first batch, and no longer does")
        if self.leaders[name] == name:
            self._inputs[name] = a

    def _follow(self, name: str, leader: str) -> None:
        self.leaders[name] = leader
        if leader != name:
            self.sums[name].share_input()

    def _not_finite(self) -> dict[str, set[str]]:
        """The layers with a bad input, and with a bad gradient."""
        bad: dict[str, set[str]] = {"input": set(), "gradient": set()}
        for name, sums in self.sums.items():
            for what, trace in sums.trace().items():
                if not trace.isfinite():
                    bad[what].add(name)
        return bad


def leaders_among(names: Iterable[str], leaders: Mapping[str, str]) -> dict[str, str]:
    """For each of some layers the first of them that reads the same input.

    Args:
        names: The layers.
        leaders: The same for more layers, in the order of a forward.

    Example:
        >>> leaders_among(["k", "v"], {"q": "q", "k": "q", "v": "q", "o": "o"})
        {'k': 'k', 'v': 'k'}
    """
    chosen = set(names)
    first: dict[str, str] = {}
    return {name: first.setdefault(leader, name) for name, leader in leaders.items() if name in chosen}


def _where_it_began(layers: list[str], inputs: set[str], gradients: set[str]) -> str:
    """The lowest layer with a bad input, else the highest with a bad gradient."""
    if first := next((name for name in layers if name in inputs), None):
        return f"the input of {first} has NaN or infinite values"
    if last := next((name for name in reversed(layers) if name in gradients), None):
        return f"the gradient at {last} has NaN or infinite values"
    return "the loss is NaN or infinite"


def _parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a capture's state says of one layer's sums."""
    parts = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
    parts.pop("count", None)
    return parts
