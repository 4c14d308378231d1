"""Editing a model's weights in the curvature basis."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.factors import FactorFolder, KroneckerFactors
from lightning_kfac.fingerprint import weights_fingerprint
from lightning_kfac.math.importance import FORMULAS, Formula, components, modified, original
from lightning_kfac.math.projection import suppress
from lightning_kfac.math.selection import check_rho, select_components, select_products
from lightning_kfac.math.spectrum import Spectrum, eigenbasis
from lightning_kfac.progress import track_count
from lightning_kfac.targets import Blocks, count_blocks, narrow, weight_matrix

# In the folder of an edited checkpoint: what was done to it.
EDIT_FILE = "edit.json"


@dataclass(frozen=True)
class EditConfig:
    """What to edit and how.

    Args:
        rho: Share of the curvature mass to keep in each layer, in [0, 1].
        formula: ``original`` ranks components by lambda_i mu_j, ``modified`` by lambda_i mu_j C_ij^2.
        blocks: Edit only these blocks (negative from the end); by default all that have factors.
        projections: Edit only these projections; by default all that have factors.
        mode: ``suppress`` keeps the top components and drops the rest.

    Raises:
        InputError: rho is outside [0, 1], or a name is unknown.

    Example:
        >>> EditConfig(rho=0.7).formula
        'original'
    """

    rho: float = 0.6
    formula: Formula = "original"
    blocks: Blocks = "all"
    projections: Sequence[str] | None = None
    mode: Literal["suppress"] = "suppress"

    def __post_init__(self):
        check_rho(self.rho)
        if self.formula not in FORMULAS:
            raise InputError(f"unknown formula {self.formula!r}; choose from {', '.join(FORMULAS)}")
        if self.mode != "suppress":
            raise InputError(f"unknown mode {self.mode!r}; choose suppress")


@dataclass(frozen=True)
class LayerReport:
    """What the edit did to one layer.

    Attributes:
        fraction_kept: n_kept / n_total.
        mass_kept: Share of the importance in the kept components; at least rho.
        norm_before, norm_after: Frobenius norms of the weight.
        relative_change: ||W' - W|| / ||W||.
    """

    name: str
    n_kept: int
    n_total: int
    fraction_kept: float
    mass_kept: float
    norm_before: float
    norm_after: float
    relative_change: float


@dataclass(frozen=True)
class EditReport:
    """What the edit did, layer by layer.

    Example:
        >>> layer = LayerReport("fc", 2, 8, 0.25, 0.7, 1.0, 0.8, 0.6)
        >>> EditReport(EditConfig(rho=0.7), [layer]).fraction_kept
        0.25
    """

    config: EditConfig
    layers: list[LayerReport]

    @property
    def fraction_kept(self) -> float:
        """Kept components over all components of all edited layers."""
        return sum(layer.n_kept for layer in self.layers) / sum(layer.n_total for layer in self.layers)

    @property
    def relative_change(self) -> float:
        """Mean over layers of ||W' - W|| / ||W||."""
        return sum(layer.relative_change for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict:
        """For ``edit.json``."""
        averages = {"fraction_kept": self.fraction_kept, "relative_change": self.relative_change}
        return {"config": asdict(self.config), **averages, "layers": [asdict(layer) for layer in self.layers]}


class KFACEditor:
    """Edits a model in place, and takes the edit back.

    Args:
        model: The model that the factors were collected on.
        factors: By dotted layer name: from ``collect_factors`` or ``load_factors``.
        config: What to do.

    Raises:
        InputError: A layer is not in the model, a shape or the model's fingerprint does not fit.

    Example:
        >>> from lightning_kfac import collect_factors
        >>> from lightning_kfac.loading import load_model
        >>> model = load_model("demo")
        >>> rows = torch.arange(1, 257).view(2, 128)
        >>> factors = collect_factors(model, [{"input_ids": rows}], blocks=[3], projections=["up"])
        >>> editor = KFACEditor(model, factors, EditConfig(rho=0.8))
        >>> report = editor.apply()
        >>> report.layers[0].name, report.layers[0].mass_kept >= 0.8
        ('model.layers.3.mlp.up_proj', True)
        >>> editor.restore()
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, KroneckerFactors], config: EditConfig | None = None):
        self.model, self.factors, self.config = model, factors, config or EditConfig()
        self.layers = _edited_layers(model, factors, self.config)
        self._originals: dict[str, Tensor] = {}
        self._bases: dict[object, Spectrum] = {}

    def apply(self) -> EditReport:
        """Edits every target in place.

        All new weights are computed before the first is written, so an error changes nothing.

        Raises:
            InputError: The model is already edited, or a layer's factors cannot be used.
        """
        if self._originals:
            raise InputError("this editor has already edited the model; call restore() first")
        edits = []
        with track_count("edit layers", "layers", total=len(self.layers)) as advance_to:
            for number, (name, layer) in enumerate(self.layers.items(), start=1):
                edits.append(self._edit(name, layer))
                advance_to(number)
        for (name, layer), (_, edited) in zip(self.layers.items(), edits, strict=True):
            self._originals[name] = layer.weight.detach().clone()
            if edited is not None:
                weight_matrix(layer).copy_(edited)
        self._bases.clear()
        return EditReport(self.config, [report for report, _ in edits])

    def restore(self) -> None:
        """Gives every edited weight its old bits back; does nothing if there was no edit."""
        for name, weight in self._originals.items():
            self.layers[name].weight.data.copy_(weight)
        self._originals.clear()

    def _edit(self, name: str, layer: nn.Module) -> tuple[LayerReport, Tensor | None]:
        """The report, and the new weight in the parameter's dtype; None where every bit stays."""
        weight = weight_matrix(layer)
        if not weight.isfinite().all():
            raise InputError(f"{name}: the weight has NaN or infinite entries")
        W = weight.double()
        G, A = self._bases_of(name, W.device)
        C = components(W, G.vectors, A.vectors)
        try:
            keep, mass = _select(C, G.values, A.values, self.config)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        n_kept = int(keep.sum())
        edited = None
        if n_kept < keep.numel():
            edited = suppress(C, keep, G.vectors, A.vectors).to(weight.dtype)
        after = W if edited is None else edited.double()
        norm = W.norm().item()
        report = LayerReport(
            name=name,
            n_kept=n_kept,
            n_total=keep.numel(),
            fraction_kept=n_kept / keep.numel(),
            mass_kept=mass,
            norm_before=norm,
            norm_after=after.norm().item(),
            relative_change=(after - W).norm().item() / norm if norm else 0.0,
        )
        return report, edited

    def _bases_of(self, name: str, device: torch.device) -> tuple[Spectrum, Spectrum]:
        """Eigenbases of G and A; a shared A is decomposed once."""
        layer = self.factors[name]
        shared = isinstance(self.factors, FactorFolder)
        key = self.factors.shared_A(name) if shared else id(layer.A)
        if key not in self._bases:
            self._bases[key] = eigenbasis(layer.A.to(device), f"A of {name}")
        return eigenbasis(layer.G.to(device), f"G of {name}"), self._bases[key]


def _select(C: Tensor, lambda_G: Tensor, mu_A: Tensor, config: EditConfig) -> tuple[Tensor, float]:
    """The keep-mask [d_out, d_in] and the share of importance in it."""
    if config.formula == "original":
        counts = select_products(lambda_G, mu_A, config.rho)
        keep = torch.arange(len(mu_A), device=C.device) < counts[:, None]
        importance = original(lambda_G, mu_A)
    else:
        importance = modified(lambda_G, mu_A, C)
        keep = select_components(importance, config.rho)
    total = importance.sum()
    return keep, (importance[keep].sum() / total).item() if total else 1.0


def check_untied(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ``InputError`` for a layer whose weight is also another layer's, such as a tied head."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        if others := [o for o in owners[id(model.get_submodule(name).weight)] if o != f"{name}.weight"]:
            raise InputError(f"{name} shares its weight with {others[0]}: an edit would change both; leave it out")


def _edited_layers(
    model: nn.Module, factors: Mapping[str, KroneckerFactors], config: EditConfig
) -> dict[str, nn.Module]:
    if not factors:
        raise InputError("there are no factors to edit with")
    modules = dict(model.named_modules())
    if missing := [name for name in factors if name not in modules]:
        raise InputError(f"the factors are of another model: it has no layer {missing[0]}")
    chosen = narrow(list(factors), count_blocks(model), config.blocks, config.projections)
    check_untied(model, chosen)
    for name in chosen:
        expected, found = tuple(weight_matrix(modules[name]).shape), factors[name].shape
        if expected != found:
            raise InputError(
                f"{name}: the weight is {expected[0]} x {expected[1]}, its factors are for {found[0]} x {found[1]}"
            )
    if isinstance(factors, FactorFolder) and (known := factors.metadata.get("fingerprint")):
        found = weights_fingerprint(model, factors)
        if found != known:
            raise InputError(
                f"{factors.path}: these factors belong to other weights (fingerprint {known[:8]}, the model has "
                f"{found[:8]}): they were collected on {factors.metadata.get('model')}"
            )
    return {name: modules[name] for name in chosen}
