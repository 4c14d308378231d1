"""(c) Eigenbases, selection and edits at the shapes of a 7B model."""

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.parts import Part
from benchmarks.selection import spectrum
from lightning_kfac import EditConfig, KFACEditor, KroneckerFactors
from lightning_kfac.math.selection import select_products
from lightning_kfac.math.spectrum import eigenbasis


def run(part: Part) -> None:
    """All steps."""
    small, large = (32, 88) if part.small else (4096, 11008)
    part.step("eigh warm", lambda: eigen(part, 32 if part.small else 512, torch.float64))
    for size in (small, large):
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            part.step(f"eigenbasis {size} {name}", lambda size=size, dtype=dtype: eigen(part, size, dtype))
    part.step("selection", lambda: selection(part, large, small))
    part.step("edit of a block", lambda: edit(part, large, small))


def covariance(size: int, device: str, seed: int = 0) -> torch.Tensor:
    """A matrix like a Kronecker factor: eigenvalues fall as a power law, in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(2 * size, size, generator=generator, device=device)
    x *= torch.arange(1, size + 1, device=device) ** -0.3
    return x.T @ x / len(x)


def eigen(part: Part, size: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one decomposition, its rate by 9 d^3, and how well it puts the matrix together again."""
    matrix = covariance(size, part.device)
    found: list[Any] = []
    seconds = part.seconds(lambda: found.append(eigenbasis(matrix, dtype=dtype)))
    values, U = found[0]
    back = (U * values.to(U.dtype)) @ U.T
    apart = float((back - matrix).norm() / matrix.norm())
    return {"seconds": seconds, "gflops": 9 * size**3 / seconds / 1e9, "residual": apart}


def selection(part: Part, d_out: int, d_in: int) -> dict[str, float]:
    """Choosing the components of one layer."""
    rows, columns = (spectrum(size, 0.6, seed).to(part.device) for seed, size in enumerate((d_out, d_in)))
    return {f"rho {rho}": part.median(lambda rho=rho: select_products(rows, columns, rho)) for rho in (0.6, 0.9)}


def edit(part: Part, d_out: int, d_in: int) -> dict[str, Any]:
    """Gate and up of one block: eigenbases of an A and two G, and the projections; then again with the bases there."""
    model = nn.Module()
    for name in ("gate", "up"):
        setattr(model, name, nn.Linear(d_in, d_out, bias=False, device=part.device, dtype=torch.bfloat16))
    model.requires_grad_(False)
    A = covariance(d_in, part.device).cpu()
    factors = {
        name: KroneckerFactors(A, covariance(d_out, part.device, seed).cpu(), 10_000)
        for seed, name in enumerate(("gate", "up"), start=1)
    }
    found: dict[str, Any] = {}
    for dtype in ("float32", "float64"):
        if found and found["float32"]["first_s"] > 30:
            break
        editor = KFACEditor(model, factors, EditConfig(rho=0.6), dtype=dtype, device=part.device)
        first = part.seconds(editor.apply)
        editor.restore()
        found[dtype] = {"first_s": first, "again_s": part.seconds(editor.apply)}
        editor.restore()
        part.free()
    return found
