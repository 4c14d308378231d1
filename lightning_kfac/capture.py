"""Capturing A and G: hooks on the tracked layers while a summed loss is differentiated.

Every layer is z[b, t] = W a[b, t]. A sums a a^T and G sums g g^T over valid (b, t), with
g = d loss / d z ("K-FAC expand": each position counts as a sample of its own).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.factors import KroneckerFactors
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.targets import weight_matrix


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (input, output gradient) to a layer's sums.

    ``root`` is a leaf that requires grad and receives none. Through it the graph begins at the lowest
    tracked output, although no parameter is trainable: nothing below is stored or differentiated.
    """

    @staticmethod
    def forward(ctx, output: Tensor, root: Tensor, a: Tensor, sums: "LayerSums") -> Tensor:
        ctx.save_for_backward(a)
        ctx.sums = sums
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (a,) = ctx.saved_tensors
        ctx.sums.add(a, gradient)
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None


class LayerSums:
    """The running sums of one layer. A layer that reads the same input as another has no A of its own."""

    def __init__(self, capture: "CurvatureCapture", d_out: int, device: torch.device):
        self.capture = capture
        self.G = SecondMoment(d_out, device)
        self.A: SecondMoment | None = None

    def add(self, a: Tensor, g: Tensor) -> None:
        """Adds one batch: a [B, T, d_in], g [B, T, d_out]."""
        dropped = ~self.capture.valid[..., None]
        self.G.add(g.masked_fill(dropped, 0).flatten(0, -2))
        if self.A is not None:
            self.A.add(a.masked_fill(dropped, 0).flatten(0, -2))


class CurvatureCapture:
    """Collects the Kronecker factors of some layers of a model.

    Usage: enter the context; for each batch set ``valid``, run the model, and call ``backward()`` on
    the summed loss; then read ``factors()``. Hooks do nothing where gradients are disabled, so the
    model can be evaluated in between. The model's parameters must not require grad.

    Args:
        layers: The tracked layers by dotted name.

    Attributes:
        valid: bool [B, T] of the current batch.
        n_tokens: Valid positions so far, int64 scalar tensor on the device (so that no batch waits for it).
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = dict(layers)
        self.device = next(iter(self.layers.values())).weight.device
        self.sums = {
            name: LayerSums(self, weight_matrix(layer).shape[0], layer.weight.device)
            for name, layer in self.layers.items()
        }
        self.root = torch.zeros((), requires_grad=True, device=self.device)
        self.n_tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self._valid: Tensor | None = None
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._handles: list = []

    @property
    def valid(self) -> Tensor:
        """bool [B, T], the positions of the current batch that count."""
        return self._valid

    @valid.setter
    def valid(self, valid: Tensor) -> None:
        self._valid = valid
        self.n_tokens += valid.sum()
        self._inputs.clear()

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
        traces = [s.G.trace() for s in self.sums.values()]
        traces += [s.A.trace() for s in self.sums.values() if s.A is not None]
        if torch.stack([loss.detach(), *traces]).isfinite().all():
            return
        raise InputError(f"{where}: {self._not_finite()}; try dtype float32, or look at the model's weights")

    def factors(self) -> dict[str, KroneckerFactors]:
        """Means over all valid positions.

        Raises:
            InputError: No batch had a valid position.
        """
        n_tokens = int(self.n_tokens)
        if not n_tokens:
            raise InputError("no valid token: every position is padding, ignored, or without a next token")
        shared = {name: s.A.sum() / n_tokens for name, s in self.sums.items() if s.A is not None}
        return {
            name: KroneckerFactors(shared[self._leaders[name]], s.G.sum() / n_tokens, n_tokens)
            for name, s in self.sums.items()
        }

    def reduce(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of all ranks; only triangles travel.

        Args:
            add_over_ranks: Sum all-reduce of a tensor.
        """
        for layer in self.sums.values():
            for moment in (layer.G, layer.A):
                if moment is not None:
                    moment.load_packed(add_over_ranks(moment.packed()))
        self.n_tokens = add_over_ranks(self.n_tokens)

    def _hook(self, name: str):
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            a = args[0].detach()
            self._assign_input(name, args[0])
            return Tap.apply(output, self.root, a, self.sums[name])

        return hook

    def _assign_input(self, name: str, a: Tensor) -> None:
        """Notes in the first forward which layers read the same tensor; later ones must agree."""
        if name not in self._leaders:
            leader = next((n for n, seen in self._inputs.items() if seen is a), name)
            self._leaders[name] = leader
            if leader == name:
                self.sums[name].A = SecondMoment(a.shape[-1], a.device)
        elif (leader := self._leaders[name]) != name and self._inputs.get(leader) is not a:
            raise InputError(f"{name} shared its input with {leader} in the first batch, and no longer does")
        if self._leaders[name] == name:
            self._inputs[name] = a

    def _not_finite(self) -> str:
        """Says where the trouble began: the lowest layer with a bad input, else the highest with a bad gradient."""
        for name, sums in self.sums.items():
            if sums.A is not None and not sums.A.trace().isfinite():
                return f"the input of {name} has NaN or infinite values"
        for name, sums in reversed(self.sums.items()):
            if not sums.G.trace().isfinite():
                return f"the gradient at {name} has NaN or infinite values"
        return "the loss is NaN or infinite"
