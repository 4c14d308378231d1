"""Experts of a mixture: each is a slice of 3-D parameters, and sees only the positions that are routed to it.

The transformers package keeps them as ``gate_up_proj`` [E, 2f, d] and ``down_proj`` [E, d, f], in some families
transposed, with gate and up interleaved, with biases, or without a gate; its modules say which. While a layer of such a
module is watched, its forward is ours: one expert after another, its positions in the order of the text. The routing
weight comes after the last projection, so that the gradient at its output has it inside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_kfac.errors import InputError
from lightning_kfac.models.fused import Rows
from lightning_kfac.models.layer import Handle, Layer, See

# Said of each experts module by the transformers package (``use_experts_implementation``).
SAID = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
DOWN = "down_proj"


@dataclass(frozen=True)
class Layout:
    """How a module stores its experts.

    Attributes:
        gated: ``gate_up_proj`` holds gate and up; else ``up_proj`` holds up alone.
        transposed: A weight is stored as [d_in, d_out].
        interleaved: Gate and up alternate, row by row; else gate comes first.
        dense: The module gets [E x N, d], for each expert all positions, zero where they are not routed to it.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    dense: bool = False

    @property
    def first(self) -> str:
        """The parameter of the first product."""
        return "gate_up_proj" if self.gated else "up_proj"

    def rows(self, projection: str, d_out: int) -> Rows:
        """Those of ``gate`` or ``up`` in the first product's output of size 2f."""
        place = ("gate", "up").index(projection)
        if self.interleaved:
            return Rows((d_out // 2, 2), (slice(None), place))
        return Rows((2, d_out // 2), (place,))


# By class, where a module does not say it itself.
LAYOUTS = {
    "Llama4TextExperts": Layout(transposed=True, dense=True),
    "LongcatFlashExperts": Layout(),
}


def layout_of(module: nn.Module) -> Layout | None:
    """How a module stores its experts; None where it is not a module of experts that we know."""
    down = getattr(module, DOWN, None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return None
    if (known := LAYOUTS.get(type(module).__name__)) is not None:
        return known
    if any(not hasattr(module, name) for name in SAID):
        return None
    said: Any = module
    return Layout(bool(said.has_gate), bool(said.is_transposed), not said.is_concatenated)


class ExpertLayer(Layer):
    """One projection of one expert, named after the parameter: ``...experts.gate_up_proj.3.gate``.

    Args:
        name: Of the module of the experts.
        module: That module.
        layout: How it stores them.
        leaf: The parameter.
        expert: Number of the expert.
        projection: ``gate`` or ``up`` where the parameter holds both.
    """

    routed = True

    def __init__(
        self, name: str, module: nn.Module, layout: Layout, leaf: str, expert: int, projection: str | None = None
    ):
        super().__init__(".".join(filter(None, (name, leaf, str(expert), projection))), module)
        self.layout = layout
        self.leaf = leaf
        self.expert = expert
        self.experts_name = name
        self.rows: Rows | None = None
        if projection is not None:
            self.rows = layout.rows(projection, self._whole(self._empty()).shape[0])

    @override
    @classmethod
    def find(cls, name: str, module: nn.Module) -> Iterator[Layer]:
        layout = layout_of(module)
        if layout is None:
            return
        experts = module.get_parameter(DOWN).shape[0]
        for expert in range(experts):
            for projection in ("gate", "up") if layout.gated else (None,):
                yield cls(name, module, layout, layout.first, expert, projection)
        for expert in range(experts):
            yield cls(name, module, layout, DOWN, expert)

    @property
    @override
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.leaf)

    @property
    @override
    def parameter_name(self) -> str:
        return f"{self.experts_name}.{self.leaf}".removeprefix(".")

    @override
    def part(self, stored: Tensor) -> Tensor:
        whole = self._whole(stored)
        return whole if self.rows is None else self.rows.take(whole, 0)

    @override
    def watch(self, see: See) -> Handle:
        runner = self.module.__dict__.get(_RUNNER)
        if runner is None:
            runner = _Runner(self.module, self.layout)
        return runner.watch(self, see)

    @override
    def outputs(self, seen: Tensor) -> Tensor:
        return seen if self.rows is None else self.rows.take(seen, -1)

    def _whole(self, stored: Tensor) -> Tensor:
        """The expert's weight [d_out, d_in] in the parameter, with all its rows."""
        weight = stored[self.expert]
        return weight.T if self.layout.transposed else weight

    def _empty(self) -> Tensor:
        return torch.empty(self.parameter.shape, device="meta")


_RUNNER = "_watched_experts"


@dataclass
class _Watch:
    """Ends one watch."""

    runner: "_Runner"
    seers: list[See]
    see: See

    def remove(self) -> None:
        if self.see in self.seers:
            self.seers.remove(self.see)
        self.runner.end_if_idle()


@dataclass
class _Runner:
    """The forward of a module of experts while some of its layers are watched; it is put there by the first watch."""

    module: nn.Module
    layout: Layout
    seers: dict[tuple[str, int], list[See]] = field(default_factory=dict)

    def watch(self, layer: ExpertLayer, see: See) -> Handle:
        if getattr(self.module, "_is_expert_parallel", False):
            raise InputError(
                f"{layer.experts_name}: its experts are spread over processes; load the model without that"
            )
        if _RUNNER not in self.module.__dict__:
            self._own_forward = self.module.__dict__.get("forward")
            self.module.__dict__[_RUNNER] = self
            self.module.__dict__["forward"] = self._dense if self.layout.dense else self._routed
        seers = self.seers.setdefault((layer.leaf, layer.expert), [])
        seers.append(see)
        return _Watch(self, seers, see)

    def end_if_idle(self) -> None:
        if any(self.seers.values()) or self.module.__dict__.pop(_RUNNER, None) is None:
            return
        del self.module.__dict__["forward"]
        if self._own_forward is not None:
            self.module.__dict__["forward"] = self._own_forward

    def _routed(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden [N, d], indices [N, k] of the experts of each position, weights [N, k] -> [N, d]."""
        hidden, indices, weights = (*args, *kwargs.values())
        n, k = indices.shape
        experts, order = indices.flatten().sort(stable=True)
        positions = order.div(k, rounding_mode="floor")
        with_weights = len(self.module.get_parameter(DOWN))
        counts = torch.bincount(experts, minlength=with_weights).tolist()
        pairs = list(zip(hidden[positions].split(counts), positions.split(counts), strict=True))
        found = [self._expert(e, x, p) for e, (x, p) in enumerate(pairs[:with_weights])]
        out = torch.cat([*found, *(x for x, _ in pairs[with_weights:])])  # LongCat's other experts change nothing
        if getattr(self.module, "has_post_expert_norm", False):
            out = self._member("post_expert_norm")(out)
        out = out * weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out[back].view(n, k, -1).sum(dim=1).to(hidden.dtype)

    def _dense(self, hidden: Tensor) -> Tensor:
        """hidden [E x N, d], zero where a position is not routed to the expert -> [E x N, d]."""
        found = []
        for e, all_inputs in enumerate(hidden.view(len(self.module.get_parameter(DOWN)), -1, hidden.shape[-1])):
            positions = all_inputs.ne(0).any(dim=-1).nonzero().flatten()
            out = self._expert(e, all_inputs[positions], positions)
            found.append(torch.zeros_like(all_inputs).index_add(0, positions, out))
        return torch.cat(found)

    def _expert(self, expert: int, x: Tensor, positions: Tensor) -> Tensor:
        """x [n, d] -> [n, d], also for no position at all: every rank then does the same steps."""
        z = self._product(self.layout.first, expert, x, positions)
        return self._product(DOWN, expert, self._activation(z), positions)

    def _activation(self, z: Tensor) -> Tensor:
        act: Callable[[Tensor], Tensor] = self._member("act_fn") if hasattr(self.module, "act_fn") else nn.Identity()
        if not self.layout.gated:
            return act(z)
        if hasattr(self.module, "_apply_gate"):
            gated: Tensor = self._member("_apply_gate")(z)
            return gated
        gate, up = z.chunk(2, dim=-1)
        return up * act(gate)

    def _product(self, leaf: str, expert: int, x: Tensor, positions: Tensor) -> Tensor:
        weight = self._member(leaf)[expert]
        z = x @ (weight if self.layout.transposed else weight.T)
        if getattr(self.module, "has_bias", False):
            z = z + self._member(f"{leaf}_bias")[expert]
        for see in self.seers.get((leaf, expert), ()):
            if (seen := see(x, z, positions)) is not None:
                z = seen
        return z

    def _member(self, name: str) -> Any:
        return getattr(self.module, name)
