"""KFACEditor: edits a model's weights in the curvature basis, and takes the edit back."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kfac.console import track_count
from lightning_kfac.distributed.ranks import Ranks, rounds
from lightning_kfac.distributed.sharding import assign, is_spread, whole
from lightning_kfac.editing.checks import (
    Factors,
    check_alpha,
    check_device,
    check_domain,
    check_formula,
    check_tokenizers,
    edited_layers,
)
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.curvature import LayerCurvature, Sources
from lightning_kfac.editing.experts import Experts, sort_experts
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.layer import edit_layer
from lightning_kfac.editing.report import EditReport, LayerReport
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder, has_coupled
from lightning_kfac.factors.moments import has_moments
from lightning_kfac.math.importance import components
from lightning_kfac.models.dtypes import as_stored
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.layer import Layer

Moments = Mapping[str, Tensor]


class KFACEditor:
    """Edits a model in place, and takes the edit back.

    Args:
        model: The model that the factors were collected on.
        factors: By dotted layer name: from ``collect_factors`` or ``load_factors``.
        config: What to do.
        domains: Factors of text whose curvature is to be protected as well, by a name of your choice.
        moments: For the corrected formulas: measured curvature by layer (``collect_moments``); by default what
            lies beside factors on disk.
        domain_moments: The same of each domain, by its name, in the basis of ``factors``.
        bases: Where eigenbases are kept; by default beside factors on disk, else in memory.
        dtype: Precision of bases and products.
        device: Where to compute, layer by layer; by default where each weight is.
        force: Edit although the factors belong to other weights, or to text that different tokenizers have cut.
        repeated: Keep each layer's components in memory, for many edits of the same weights.
        ranks: The processes that edit together: each computes the new weights of its own layers and sends them to
            all, so that their bits are the same everywhere. All must do the same calls.
        owners: The rank of each layer, where only one has its factors; by default shared out by cost.

    Raises:
        InputError: A layer is not in the model, a shape or a fingerprint does not fit.

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

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        config: EditConfig | None = None,
        *,
        domains: Mapping[str, Factors] | None = None,
        moments: Moments | None = None,
        domain_moments: Mapping[str, Moments] | None = None,
        bases: BasisCache | None = None,
        dtype: Literal["float64", "float32"] = "float64",
        device: torch.device | str | None = None,
        force: bool = False,
        repeated: bool = False,
        ranks: Ranks | None = None,
        owners: Mapping[str, int] | None = None,
    ):
        if dtype not in ("float64", "float32"):
            raise InputError(f"unknown dtype {dtype!r}; choose float64 or float32")
        self.model = model
        self.config = config or EditConfig()
        bases = bases or BasisCache.beside(factors, getattr(torch, dtype))
        self.sources = Sources(factors, bases, dict(domains or {}), moments, domain_moments or {})
        self.device = device
        self.repeated = repeated
        self.ranks = ranks or Ranks()
        self.owners = owners
        self.forced = False
        check_device(device)
        self.layers = self.check(self.config)
        for folder in (factors, *self.sources.domains.values()):
            self._check_fingerprint(folder, force)
        self._check_tokenizers(force)
        self._originals: dict[nn.Parameter, Tensor] = {}
        self._curvatures: dict[str, LayerCurvature] = {}

    def apply(self, config: EditConfig | None = None, *, dry_run: bool = False) -> EditReport:
        """Edits every target in place; where it fails or is stopped, nothing has changed.

        Args:
            config: Instead of the editor's own, for this time.
            dry_run: Only report: no weight is touched.

        Raises:
            InputError: The model is already edited, or a layer's factors cannot be used.
        """
        if self._originals:
            raise InputError("this editor has already edited the model; call restore() first")
        config = config or self.config
        layers, experts = self._checked(config)
        active = self._active(config)
        reports: dict[str, LayerReport] = {}
        owners = self.owners or self.sources.bases.owners(self.sources.factors, layers, self.ranks.size)
        try:
            with track_count("edit layers", "layers", total=len(layers)) as advance_to:
                for names in rounds(layers, owners):
                    some = {name: layers[name] for name in names}
                    reports |= self._edit_round(some, owners, config, active, dry_run, experts.pooled)
                    advance_to(len(reports))
        except BaseException:
            self.restore()
            raise
        alphas = {d: 1.0 if config.mix == "union" else config.alpha_of(d) for d in active}
        done = [reports[name] for name in layers]
        return EditReport(config, done, alphas or None, self.forced, experts.unedited)

    def check(self, config: EditConfig) -> dict[str, Layer]:
        """The layers that an edit would change, by name.

        Raises:
            InputError: A layer, a domain's factors of it or its moments are missing, or options exclude each other.
        """
        return self._checked(config)[0]

    def _checked(self, config: EditConfig) -> tuple[dict[str, Layer], Experts]:
        """The same, and what becomes of experts with few tokens."""
        layers = edited_layers(self.model, self.sources.factors, config)
        experts = sort_experts(layers, self.sources.factors, config)
        if experts.pooled and self.owners is not None:
            raise InputError("expert_inputs layer needs all factors on every rank: edit from the saved factors")
        layers = {name: layer for name, layer in layers.items() if name not in experts.unedited}
        check_alpha(config, self.sources.domains)
        active = self._active(config)
        for domain in active:
            check_domain(domain, self.sources.domains[domain], self.sources.factors, layers)
        there = self.collected()
        for name in layers:
            check_formula(config.for_layer(name), bool(active), there)
        return layers, experts

    def collected(self) -> set[str]:
        """What was, beside A and G, as formulas need it."""
        factors = self.sources.factors
        moments = {"moments"} if self.sources.moments is not None or has_moments(factors) else set()
        return moments | ({"coupled"} if has_coupled(factors) else set())

    def _active(self, config: EditConfig) -> list[str]:
        """The domains that have a say."""
        return [domain for domain in self.sources.domains if config.mix == "union" or config.alpha_of(domain)]

    def changes(self, config: EditConfig | None = None) -> tuple[EditReport, dict[str, Tensor]]:
        """What an edit would do: its report, and W' - W of every layer on the CPU. The model is as it was afterwards.

        Args:
            config: Instead of the editor's own.
        """
        layers = self.layers if config is None else self.check(config)
        before = {name: layer.W.detach().cpu().clone() for name, layer in layers.items()}
        report = self.apply(config)
        try:
            return report, {name: layers[name].W.detach().cpu() - W for name, W in before.items()}
        finally:
            self.restore()

    def diagonal_price(self, name: str, dW: Tensor) -> float:
        """Half the sum of m_ij dC_ij^2: the second-order cost of changing a layer's weight, without any text.

        With m the measured moments where there are any, else those of rank one that coupled factors give, else
        lambda_i mu_j.

        Args:
            dW: [d_out, d_in].

        Returns:
            In nats a token, of the text that the factors were collected on.
        """
        curvature = self._curvature(name, torch.device(self.device or "cpu"), None)
        basis = curvature.general
        there = self.collected()
        formula = "corrected" if "moments" in there else "coupled" if "coupled" in there else "original"
        moments = FORMULAS[formula].part(curvature, basis, None)
        dC = components(dW.to(basis.G.vectors), basis.G.vectors, basis.A.vectors)
        return float((moments * dC.double() ** 2).sum()) / 2

    def restore(self) -> None:
        """Gives every edited weight its old bits back; does nothing if there was no edit."""
        for parameter, stored in self._originals.items():
            parameter.data.copy_(stored)
        self._originals.clear()

    @torch.no_grad()
    def _edit_round(
        self,
        layers: Mapping[str, Layer],
        owners: Mapping[str, int],
        config: EditConfig,
        active: list[str],
        dry_run: bool,
        pooled: Mapping[str, tuple[str, ...]],
    ) -> dict[str, LayerReport]:
        """Edits at most one layer of each rank at the same time."""
        mine: tuple[str, Tensor] | None = None
        edited: Tensor | None = None
        report: LayerReport | None = None
        for name, layer in layers.items():
            stored = whole(layer.parameter.detach())
            if owners[name] == self.ranks.rank:
                mine = name, layer.matrix(stored)
        with self.ranks.together():
            if mine is not None:
                name, weight = mine
                curvature = self._curvature(name, torch.device(self.device or weight.device), pooled.get(name))
                edited, report = edit_layer(weight, curvature, config.for_layer(name), active)
                edited = None if edited is None else as_stored(self.model, edited)  # what is measured is what is saved
        # Of each rank what it did, and whether its weight has changed.
        of_ranks = self.ranks.gather((report, edited is not None))
        done = [(found, changed) for found, changed in of_ranks if found is not None]
        for found, changed in done:
            if not dry_run:
                own = edited if mine is not None and found.name == mine[0] else None
                self._write(layers[found.name], own if changed else None, changed, owners[found.name])
        return {found.name: found for found, _ in done}

    def _write(self, layer: Layer, edited: Tensor | None, changed: bool, owner: int) -> None:
        """Gives a layer the weight that its owner has computed."""
        if layer.parameter not in self._originals:  # several layers may lie in one
            self._originals[layer.parameter] = layer.parameter.detach().clone()
        if not changed:
            return
        parameter = layer.parameter.detach()
        if edited is None:  # another rank has it
            edited = torch.empty(layer.shape, dtype=parameter.dtype, device=parameter.device)
        edited = self.ranks.broadcast(edited.to(parameter.device).contiguous(), owner)
        if not is_spread(parameter):
            layer.write(parameter, edited)
            return
        if edited.numel() == parameter.numel():
            stored = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        else:  # the rest of the parameter stays
            stored = whole(parameter).clone()
        layer.write(stored, edited)
        assign(parameter, stored)

    def _curvature(self, name: str, device: torch.device, pool: tuple[str, ...] | None) -> LayerCurvature:
        """The layer's curvature; the same each time where edits are repeated."""
        if not self.repeated or pool is not None:
            return LayerCurvature(name, self.sources, device, pool=pool)
        if name not in self._curvatures:
            self._curvatures[name] = LayerCurvature(name, self.sources, device, repeated=True)
        return self._curvatures[name]

    def _check_fingerprint(self, factors: Factors, force: bool) -> None:
        """Factors of other weights are refused, or noted."""
        if not isinstance(factors, FactorFolder) or not (known := factors.metadata.get("fingerprint")):
            return
        found = weights_fingerprint(self.model, factors)
        if found == known:
            return
        if not force:
            raise InputError(
                f"{factors.path}: these factors belong to other weights (fingerprint {known[:8]}, the model has "
                f"{found[:8]}): they were collected on {factors.metadata.get('model')}; force=True edits all the "
                "same",
                "force=True",
            )
        self.forced = True

    def _check_tokenizers(self, force: bool) -> None:
        """Factors of text that different tokenizers have cut are refused, or noted."""
        try:
            check_tokenizers(self.sources.factors, self.sources.domains)
        except InputError:
            if not force:
                raise
            self.forced = True
