"""Machines for plans on paper: vendors' figures, and the shares of them that were measured."""

from dataclasses import dataclass
from typing import Literal

from lightning_kfac.errors import InputError

# How several devices share a collection; auto is the fastest that fits.
Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Hardware:
    """One device, and how it reaches the others. Rates in FLOP/s and bytes/s.

    Attributes:
        flops: Peak of dense bfloat16 matrix products (float32 on a CPU).
        memory: Bytes.
        within: To devices of the same node, each direction.
        between: Its share of its node's network, each direction.
        eigen: What float64 eigendecompositions and rotations reach.
        efficiency: Share of ``flops`` that a collection reaches.
        per_node: Devices in a usual node.
        kind: What plan.py calls it.
    """

    flops: float
    memory: float
    within: float
    between: float
    eigen: float
    efficiency: float = 0.4
    per_node: int = 8
    kind: str = "cuda"


# NVIDIA's data sheets (SXM modules; NVLink, and one 200 or 400 Gbit/s adapter a GPU as in DGX nodes). 40 % of the peak
# is what large training runs report (Llama 3: 38 to 43 %), and an H200 reached (docs/gpu.md): 37 % with three blocks
# of a 7B model tracked, 40 % with all. Its float64 eigendecompositions of 11008 reached 10.6e12 by 9 d^3, those of 4096
# 5.5e12; an H100 has the same arithmetic. For an A100 2 % of the float64 peak is a guess.
HARDWARE = {
    "a100": Hardware(312e12, 80e9, 300e9, 25e9, 0.02 * 19.5e12),
    "h100": Hardware(989e12, 80e9, 450e9, 50e9, 10e12),
    "h200": Hardware(989e12, 141e9, 450e9, 50e9, 10e12),
    # One core of the machine in docs/scaling.md: rates as measured there; memory and bandwidth are guesses.
    "cpu": Hardware(71e9, 4e9, 1e9, 1e9, 24e9, efficiency=0.8, per_node=2, kind="cpu"),
}


def find_hardware(name: str) -> Hardware:
    """A machine of the table; raises ``InputError`` for another name."""
    if name not in HARDWARE:
        known = ", ".join(HARDWARE)
        raise InputError(f"hardware {name}: not known; choose from {known}, and override its figures", "hardware")
    return HARDWARE[name]
