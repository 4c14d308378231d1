"""Capturing A and G: hooks on the tracked layers while a summed loss is differentiated.

Every layer is z[b, t] = W a[b, t]. A sums a a^T and G sums g g^T over the positions that count, with
g = d loss / d z ("K-FAC expand": each position counts as a sample of its own).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.collection.sums import FactorSums, LayerSums, NoSums
from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.layer import Handle, Layer, See

POSITIONS = "positions"


@dataclass(frozen=True)
class Uses:
    """How a forward uses layers, found in a trial.

    Attributes:
        leaders: For each layer that runs the first that reads the same inputs, itself where there is none.
        changed: Layers whose input is changed in place afterwards: what they saw must be copied.
    """

    leaders: Mapping[str, str]
    changed: frozenset[str] = frozenset()


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (input, output gradient) to the layer's sums.

    ``root`` is a leaf that requires grad and receives none. Through it the graph begins at the lowest
    tracked output, although no parameter is trainable: nothing below is stored or differentiated.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, output: Tensor, root: Tensor, a: Tensor, where: Tensor | None, capture: "CurvatureCapture", name: str
    ) -> Tensor:
        ctx.save_for_backward(a, where)
        ctx.capture = capture
        ctx.name = name
        ctx.first_draw = True
        if output._is_view():  # GPT-2's Conv1D ends in a view
            return output.view_as(output)
        ctx.mark_dirty(output)  # no view, so that a model may add to it in place, as Falcon does
        return output

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        a, where = ctx.saved_tensors
        ctx.capture.add(ctx.name, a, gradient, ctx.first_draw, where)
        ctx.first_draw = False
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None, None, None


class CurvatureCapture:
    """Hooks on some layers of a model that sum curvature over batches.

    Usage: enter the context; for each batch call ``begin``, run the model, and call ``backward()`` on
    each summed loss; then take ``results()``. Hooks do nothing where gradients are disabled, so the
    model can be evaluated in between. The model's parameters must not require grad.

    Args:
        layers: The tracked layers by name.
        sums: Makes the sums of a layer; by default those of A and G.
        uses: What a trial has found out of these layers and perhaps others; by default, which of them read the same
            input is found in the first forward.
        per_position_masks: Leave layers unmasked whose input is not one vector a position, instead of
            refusing them: for models other than language models.
        ranks: Processes that add to the same sums at every batch, each of which one of them keeps.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sums: Callable[[Layer], LayerSums[Any]] = FactorSums,
        uses: "Uses | None" = None,
        per_position_masks: bool = False,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.layers = dict(layers)
        self._make = sums
        self.per_position_masks = per_position_masks
        self.sums = {name: sums(layer) for name, layer in self.layers.items()}
        device = next(iter(self.layers.values())).device
        self.root = torch.zeros((), requires_grad=True, device=device)
        # On the device, so that no batch waits for it.
        self.counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in self.layers}
        self.positions = torch.zeros((), dtype=torch.int64, device=device)
        self.leaders: dict[str, str] = {}
        self._valid: Tensor | None = None
        self._shape: tuple[int, int] | None = None
        self._seen: dict[str, list[Input]] = {}
        self._firsts: dict[tuple[int, Input], str] = {}
        self._handles: list[Handle] = []
        uses = uses or Uses({})
        self._changed = uses.changed
        for name, leader in leaders_among(self.layers, uses.leaders).items():
            self._follow(name, leader)

    def begin(self, valid: Tensor | None, shape: tuple[int, int] | None = None) -> None:
        """Starts a batch.

        Args:
            valid: bool [B, T], the positions that count; None if all do.
            shape: (B, T), where it is known.
        """
        self._valid = valid
        self._shape = shape
        self._forget()
        if valid is not None:
            self.positions += valid.sum()
        elif shape is not None:
            self.positions += shape[0] * shape[1]

    def add(self, name: str, a: Tensor, g: Tensor, first_draw: bool, where: Tensor | None = None) -> None:
        """Adds what one layer saw, without the positions that do not count.

        Args:
            where: int64 [n], where only some positions come to the layer: which.
        """
        a, g, count = self._counted(name, a, g, where)
        self.sums[name].add(a, g, first_draw, self._rows(where))
        if first_draw:
            self.counts[name] += count

    def _counted(self, name: str, a: Tensor, g: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor, int | Tensor]:
        """A layer's vectors, zero at positions that do not count, and how many do."""
        a = self.layers[name].inputs(a)
        g = self.layers[name].outputs(g)
        if self._valid is not None and len(self._valid) == 1 and a.shape[:-1] == self._valid.T.shape:
            a = a.transpose(0, 1)  # XLNet has positions first, which for one row cannot be mistaken
            g = g.transpose(0, 1)
        valid = self._of_positions(name, a, where)
        if valid is not None:
            dropped = ~valid[..., None]
            a = a.masked_fill(dropped, 0)
            g = g.masked_fill(dropped, 0)
        return a, g, a[..., 0].numel() if valid is None else valid.sum()

    def _of_positions(self, name: str, a: Tensor, where: Tensor | None) -> Tensor | None:
        """Which of a layer's inputs count, bool like a without its last dimension; None if all do."""
        valid = self._valid
        if valid is None:
            return None
        if where is not None:
            return valid.flatten()[where]
        if a.shape[:-1] == valid.shape or (a.ndim == 2 and len(a) == valid.numel()):
            return valid.reshape(a.shape[:-1])  # some models flatten rows and positions
        if self.per_position_masks:
            return None
        raise InputError(
            f"{name} has an input of shape {list(a.shape)}, not one vector for each of "
            f"{list(valid.shape)} rows and positions; leave it out"
        )

    def _rows(self, where: Tensor | None) -> Tensor | None:
        """Of which row of the batch each of some positions is."""
        if where is None or self._shape is None:
            return where
        return where.div(self._shape[1], rounding_mode="floor")

    def __enter__(self) -> Self:
        for name, layer in self.layers.items():
            self._handles.append(layer.watch(self._see(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

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
        if apart := [name for name, leader in self.leaders.items() if counts[name] != counts[leader]]:
            raise InputError(f"{apart[0]} ran less often than {self.leaders[apart[0]]}, whose input it shares")
        found: dict[str, Any] = {}
        for name, leader in self.leaders.items():  # leaders come first, as they did in the forward
            found[name] = self.sums.pop(name).result(counts[name], draws, found.get(leader))
        return {name: found[name] for name in self.layers}

    def snapshot(self, add_over_ranks: Callable[[Tensor], Tensor], draws: int = 1) -> dict[str, KroneckerFactors]:
        """The factors so far, of all ranks; collection goes on."""
        copy = CurvatureCapture(self.layers, self._make, uses=Uses(self.leaders))
        copy.counts = dict(self.counts)
        for name, sums in self.sums.items():
            copy.sums[name].load(sums.tensors())
        copy.reduce(add_over_ranks)
        return copy.results(draws)

    def state(self) -> dict[str, Tensor]:
        """Sums and counts of this rank by ``layer/part``, for ``load_state``."""
        state = {f"{name}/{key}": value for name, sums in self.sums.items() for key, value in sums.state().items()}
        return state | {f"{name}/count": count for name, count in self.counts.items()} | {POSITIONS: self.positions}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what ``state`` gave, bit for bit; the leaders must be those of the capture that gave it."""
        for name, sums in self.sums.items():
            sums.load_state(_parts(state, name))
        for name, count in self.counts.items():
            count.copy_(state[f"{name}/count"])
        self.positions.copy_(_positions(state))

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
        self.positions += _positions(state).to(self.positions.device)

    def reduce(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of all ranks; only triangles travel.

        Args:
            add_over_ranks: Sum all-reduce of a tensor.
        """
        for name, sums in self.sums.items():
            if self.ranks.size == 1:  # else they are sums over ranks already
                sums.load([add_over_ranks(tensor) for tensor in sums.tensors()])
            self.counts[name] = add_over_ranks(self.counts[name])
        self.positions = add_over_ranks(self.positions)

    def _forget(self) -> None:
        self._seen.clear()
        self._firsts.clear()

    def _see(self, name: str) -> See:
        def see(a: Tensor, z: Tensor, positions: Tensor | None = None) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self._note_input(name, a)
            kept = a.detach().clone() if name in self._changed else a.detach()
            return Tap.apply(z, self.root, kept, positions, self, name)

        return see

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def _note_input(self, name: str, a: Tensor) -> None:
        """Notes in the first forward which layers read the same tensor, unless that is known; later ones must agree."""
        seen = self._seen.setdefault(name, [])
        mine = Input(a, a._version)
        place = len(seen)
        seen.append(mine)
        first = self._firsts.setdefault((place, mine), name)
        if name not in self.leaders:
            self._follow(name, first)
            return
        leader = self.leaders[name]
        theirs = self._seen.get(leader, [])
        if leader != name and not (len(theirs) > place and theirs[place] == mine):
            raise InputError(f"{name} shared its input with {leader} in the first batch, and no longer does")

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


class Trial(CurvatureCapture):
    """Sums nothing: finds in one forward how layers are used.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, Layer]):
        super().__init__(layers, lambda layer: NoSums())

    def uses(self) -> Uses:
        """How the forward used the layers: those with the same inputs, one after another, share them."""
        first: dict[tuple[Input, ...], str] = {}
        leaders = {name: first.setdefault(tuple(inputs), name) for name, inputs in self._seen.items()}
        changed = (name for name, inputs in self._seen.items() if any(seen.changed for seen in inputs))
        return Uses(leaders, frozenset(changed))

    @override
    def _note_input(self, name: str, a: Tensor) -> None:
        self._seen.setdefault(name, []).append(Input(a, a._version))


@dataclass(frozen=True, eq=False)
class Input:
    """A tensor that a layer was called with, as it was then: it may be changed in place afterwards."""

    tensor: Tensor
    version: int

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Input) and self.tensor is other.tensor and self.version == other.version

    @override
    def __hash__(self) -> int:
        return hash((id(self.tensor), self.version))

    @property
    def changed(self) -> bool:
        """Whether it has been changed since."""
        return self.tensor._version != self.version


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


def _positions(state: Mapping[str, Tensor]) -> Tensor:
    """All positions that counted. Version 0.1 kept no such count, but every layer ran once for each of them."""
    if POSITIONS in state:
        return state[POSITIONS]
    return torch.stack([value for key, value in state.items() if key.endswith("/count")]).max()


def _parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a capture's state says of one layer's sums."""
    parts = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
    parts.pop("count", None)
    return parts
