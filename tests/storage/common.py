"""A small factor folder, and whether two of them are the same."""

import struct
from pathlib import Path

import torch

from lightning_kfac import KroneckerFactors, load_factors, save_factors
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.moments import load_moments, save_moments


def made_factors(seed: int = 0, size: int = 6) -> dict[str, KroneckerFactors]:
    """Two layers of one shape that share no A, and a third that shares the second's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(d: int) -> torch.Tensor:
        x = torch.randn(d, d, generator=generator)
        return (x @ x.T).triu() + (x @ x.T).triu(1).T

    A = draw(size)
    layers = {"first": (draw(size), draw(8)), "second": (A, draw(8)), "third": (A, draw(5))}
    return {name: KroneckerFactors(A, G, 10 + seed) for name, (A, G) in layers.items()}


def save_all(path: Path) -> Path:
    """A factor folder with bases and moments."""
    save_factors(made_factors(), path, {"model": "demo", "n_tokens": 10})
    factors = load_factors(path)
    bases = BasisCache.beside(factors)
    for name in factors:
        bases.of(factors, name)
    generator = torch.Generator().manual_seed(1)
    moments = {name: torch.rand(factors.layer_shape(name), generator=generator) for name in factors}
    save_moments(moments, path, factors, bases, "token")
    return path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Everything that a factor folder gives; None for moments that it does not have."""
    factors = load_factors(path)
    bases, found = BasisCache.beside(factors), {}
    for name in factors:
        layer = factors[name]
        found |= {f"{name} A": layer.A, f"{name} G": layer.G, f"{name} n": torch.tensor(layer.n_tokens)}
        moments = load_moments(path, factors, bases, name)
        found[f"{name} moments"] = None if moments is None else moments.clone()  # it is a view of the file
        for side, spectrum in zip("GA", bases.of(factors, name), strict=True):
            found |= {f"{name} {side} {part}": getattr(spectrum, part).clone() for part in ("values", "vectors")}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    if one.keys() != other.keys() or any((one[name] is None) != (other[name] is None) for name in one):
        return False
    return all(value is None or torch.equal(value, other[name]) for name, value in one.items())


def body_of(path: Path) -> int:
    """Where the tensors of a file begin; behind its end for other files."""
    contents = path.read_bytes()
    return 8 + struct.unpack("<Q", contents[:8])[0] if path.suffix == ".safetensors" else len(contents)
