"""Capturing A and G: hooks on the tracked layers while a summed loss is differentiated.

Every layer is z[b, t] = W a[b, t]. A sums a a^T and G sums g g^T over the positions that count, with
g = d loss / d z ("K-FAC expand": each position counts as a sample of its own).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_kfac.collection.sums import FactorSums, LayerSums
from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.kronecker import KroneckerFactors


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (input, output gradient) to the layer's sums.

    ``root`` is a leaf that requires grad and receives none. Through it the graph begins at the lowest
    tracked output, although no parameter is trainable: nothing below is stored or differentiated.
    """

    @staticmethod
    def forward(ctx, output: Tensor, root: Tensor, a: Tensor, capture: "CurvatureCapture", name: str) -> Tensor:
        ctx.save_for_backward(a)
        ctx.capture, ctx.name, ctx.first_draw = capture, name, True
        if output._is_view():  # GPT-2's Conv1D ends in a view
            return output.view_as(output)
        ctx.mark_dirty(output)  # no view, so that a model may add to it in place, as Falcon does
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (a,) = ctx.saved_tensors
        ctx.capture.add(ctx.name, a, gradient, ctx.first_draw)
        ctx.first_draw = False
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None, None


class CurvatureCapture:
    """Hooks on some layers of a model that sum curvature over batches.

    Usage: enter the context; for each batch call ``begin``, run the model, and call ``backward()`` on
    each summed loss; then read ``factors()``. Hooks do nothing where gradients are disabled, so the
    model can be evaluated in between. The model's parameters must not require grad.

    Args:
        layers: The tracked layers by dotted name.
        sums: Makes the sums of a layer from its name and module; by default those of A and G.
        per_position_masks: Leave layers unmasked whose input is not one vector a position, instead of
            refusing them: for models other than language models.
        ranks: Processes that add to the same sums at every batch, each of which one of them keeps.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        sums: Callable[[str, nn.Module], LayerSums] | None = None,
        per_position_masks: bool = False,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.layers, self.per_position_masks = dict(layers), per_position_masks
        make = sums or (lambda name, layer: FactorSums(layer))
        self.sums = {name: make(name, layer) for name, layer in self.layers.items()}
        device = next(iter(self.layers.values())).weight.device
        self.root = torch.zeros((), requires_grad=True, device=device)
        # On the device, so that no batch waits for it.
        self.counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in self.layers}
        self.leaders: dict[str, str] = {}
        self._valid: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}
        self._handles: list = []

    def begin(self, valid: Tensor | None) -> None:
        """Starts a batch.

        Args:
            valid: bool [B, T], the positions that count; None if all do.
        """
        self._valid = valid
        self._inputs.clear()

    def add(self, name: str, a: Tensor, g: Tensor, first_draw: bool) -> None:
        """Adds what one layer saw, without the positions that do not count."""
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
            a, g = a.masked_fill(dropped, 0), g.masked_fill(dropped, 0)
        self.sums[name].add(a, g, first_draw)
        if first_draw:
            self.counts[name] += a[..., 0].numel() if valid is None else valid.sum()

    def __enter__(self) -> "CurvatureCapture":
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_) -> None:
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
            message = _where_it_began(list(self.sums), bad)
            raise InputError(f"{where}: {message}; try dtype float32, or look at the model's weights")

    def n_tokens(self) -> dict[str, int]:
        """Positions that counted so far, by layer."""
        return {name: int(count) for name, count in self.counts.items()}

    def factors(self, mc_samples: int = 1) -> dict[str, KroneckerFactors]:
        """Means over all positions that counted, for sums of A and G, which are given up one by one.

        Raises:
            InputError: No position counted.
        """
        counts = self.n_tokens()
        if not any(counts.values()):
            raise InputError("no valid token: every position is padding, ignored, or without a next token")
        inputs: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            if sums.A is not None:
                inputs[name], sums.A = sums.A.sum().div_(counts[name]), None
        return {
            name: KroneckerFactors(
                inputs[self.leaders[name]], self.sums.pop(name).G.sum().div_(mc_samples * counts[name]), counts[name]
            )
            for name in list(self.sums)
        }

    def snapshot(self, add_over_ranks: Callable[[Tensor], Tensor], mc_samples: int = 1) -> dict[str, KroneckerFactors]:
        """The factors so far, of all ranks; collection goes on."""
        copy = CurvatureCapture(self.layers)
        copy.leaders, copy.counts = self.leaders, dict(self.counts)
        for name, sums in self.sums.items():
            if sums.A is None:
                copy.sums[name].A = None
            copy.sums[name].load(sums.tensors())
        copy.reduce(add_over_ranks)
        return copy.factors(mc_samples)

    def state(self) -> dict[str, Tensor]:
        """Sums and counts of this rank by ``layer/part``, for ``load_state``."""
        state = {f"{name}/{key}": value for name, sums in self.sums.items() for key, value in sums.state().items()}
        return state | {f"{name}/count": count for name, count in self.counts.items()}

    def load_state(self, state: Mapping[str, Tensor], leaders: Mapping[str, str]) -> None:
        """Goes on from what ``state`` gave, bit for bit.

        Args:
            leaders: The attribute of the capture that gave the state.
        """
        self.share_inputs(leaders)
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

    def share_inputs(self, leaders: Mapping[str, str]) -> None:
        """Says before the first batch which layers read the same input, as the attribute ``leaders`` does after it."""
        self.leaders = dict(leaders)
        for name, sums in self.sums.items():
            if isinstance(sums, FactorSums) and leaders.get(name, name) != name:
                sums.A = None

    def reduce(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of all ranks; only triangles travel.

        Args:
            add_over_ranks: Sum all-reduce of a tensor.
        """
        for name, sums in self.sums.items():
            if self.ranks.size == 1:  # else they are sums over ranks already
                sums.load([add_over_ranks(tensor) for tensor in sums.tensors()])
            self.counts[name] = add_over_ranks(self.counts[name])

    def _hook(self, name: str):
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self._note_input(name, args[0])
            return Tap.apply(output, self.root, args[0].detach(), self, name)

        return hook

    @torch.compiler.disable
    def _note_input(self, name: str, a: Tensor) -> None:
        """Notes in the first forward which layers read the same tensor; later ones must agree."""
        if name not in self.leaders:
            self.leaders[name] = next((n for n, seen in self._inputs.items() if seen is a), name)
            if self.leaders[name] != name and isinstance(self.sums[name], FactorSums):
                self.sums[name].A = None
        elif (leader := self.leaders[name]) != name and self._inputs.get(leader) is not a:
            raise InputError(f"{name} shared its input with {leader} in the first batch, and no longer does")
        if self.leaders[name] == name:
            self._inputs[name] = a

    def _not_finite(self) -> dict[str, set[str]]:
        """The layers with a bad input, and with a bad gradient."""
        bad: dict[str, set[str]] = {"input": set(), "gradient": set()}
        for name, sums in self.sums.items():
            for what, trace in sums.trace().items():
                if not trace.isfinite():
                    bad[what].add(name)
        return bad


def _where_it_began(layers: list[str], bad: Mapping[str, set[str]]) -> str:
    """The lowest layer with a bad input, else the highest with a bad gradient."""
    for what, names in (("input of", layers), ("gradient at", reversed(layers))):
        if first := next((name for name in names if name in bad[what.split()[0]]), None):
            return f"the {what} {first} has NaN or infinite values"
    return "the loss is NaN or infinite"


def _parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a capture's state says of one layer's sums."""
    parts = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
    parts.pop("count", None)
    return parts
