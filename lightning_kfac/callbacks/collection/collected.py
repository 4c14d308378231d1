"""What a collection has found so far, in memory and in the run's folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_kfac.callbacks.collection.passes import Pass
from lightning_kfac.data.names import CORPUS
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import input_leaders, load_factors, save_factors
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.factors.moments import load_moments, save_moments
from lightning_kfac.factors.sharded import save_sharded
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.run_folder import FACTORS, PREVIOUS
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

MOMENTS_FILE = "moments.safetensors"


class Collected:
    """Factors and moments by text. Every rank holds them; rank 0 writes.

    Args:
        root: The run's folder.
        writes: Whether this is rank 0.

    Attributes:
        factors: Those of the corpus by dotted layer name.
        domain_factors: The same of each domain, by its name.
        moments: Measured curvature by text: ``corpus`` or a domain.
        owners: The one rank that has the factors of each layer; None where every rank has all.
        bases: Eigenbases of ``factors``, kept beside them by every rank that sees them there.
    """

    def __init__(self, root: Path, writes: bool):
        self.root, self.writes = root, writes
        self.factors: dict[str, KroneckerFactors] = {}
        self.domain_factors: dict[str, dict[str, KroneckerFactors]] = {}
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.owners: dict[str, int] | None = None
        self.bases = BasisCache(root / FACTORS / "bases" if writes else None)

    def of(self, work: Pass) -> dict:
        """What a pass adds to."""
        if work.moments:
            return self.moments.setdefault(work.text, {})
        return self.factors if work.text == CORPUS else self.domain_factors.setdefault(work.text, {})

    def folder(self, text: str) -> Path:
        """Where the factors of a text are."""
        return self.root / FACTORS if text == CORPUS else self.root / "domains" / text

    def save(self, work: Pass, kind: str | None, metadata: Mapping) -> None:
        """Writes what all passes over one text have found.

        Args:
            work: The last of these passes.
            kind: Of moments: ``token`` or ``sequence``.
            metadata: Of factors.
        """
        if not work.moments:
            self._save_factors(self.of(work), self.folder(work.text), metadata)
        elif self.writes:
            save_moments(self.of(work), self.folder(work.text), self.factors, self.bases, kind)

    def _save_factors(self, factors: dict[str, KroneckerFactors], folder: Path, metadata: Mapping) -> None:
        ranks = current_ranks()
        if self.owners is not None and not all(ranks.gather(self._is_there(folder, factors, metadata))):
            save_sharded(factors, folder, metadata, ranks, self.owners)
        elif self.owners is None and self.writes and not self._is_there(folder, factors, metadata):
            save_factors(factors, folder, metadata)

    @staticmethod
    def _is_there(folder: Path, ours: dict[str, KroneckerFactors], metadata: Mapping) -> bool:
        """Whether an interrupted run has saved these very factors, which may have bases beside them by now."""
        try:
            found = load_factors(folder)
            same = all(found.metadata.get(key) == value for key, value in metadata.items())
            return same and list(found) == list(ours) and all(_equal(found[name], ours[name]) for name in ours)
        except InputError:  # there is none, or a damaged one
            return False

    # -- parts of a text, which a run that goes on after a stop needs -----------------------------------

    def save_part(self, work: Pass, folder: Path) -> None:
        """Writes what one pass has found, where further passes over the same text are to come."""
        found = {name: self.of(work)[name] for name in work.layers}
        if not work.moments:
            self._save_factors(found, folder, {})
        elif self.writes:
            with new_folder(folder) as partial:
                save_tensors(found, partial / MOMENTS_FILE)

    def load_part(self, work: Pass, folder: Path) -> None:
        """Reads what one pass has found: from ``save_part``, or from what ``save`` made of the whole text."""
        if folder.is_dir():
            file = folder / MOMENTS_FILE
            found = load_tensors(file, "collect again") if work.moments else self._read(folder)
        elif work.moments:
            place = self.folder(work.text)
            found = {name: load_moments(place, self.factors, self.bases, name) for name in work.layers}
        else:
            found = self._read(self.folder(work.text))
        self.of(work).update({name: found[name] for name in work.layers})

    def _read(self, folder: Path) -> dict[str, KroneckerFactors]:
        """Every layer of a folder in memory; what is shared on disk is shared here, what another rank owns is empty."""
        stored, found, inputs = load_factors(folder), {}, {}
        for name in stored:
            if self.owners is None or self.owners[name] == current_ranks().rank:
                layer = stored[name]
            else:
                d_out, d_in = stored.layer_shape(name)
                A, G = (torch.empty(d, d, device="meta") for d in (d_in, d_out))
                layer = KroneckerFactors(A, G, stored.metadata["layers"][name]["n_tokens"])
            A = inputs.setdefault(stored.shared_A(name), layer.A)
            found[name] = KroneckerFactors(A, layer.G, layer.n_tokens)
        return found

    def reuse(self, metadata: Mapping, layers: list[str]) -> dict | None:
        """Takes the corpus' factors of an earlier run of the same settings, which lie in the folder or were put aside.

        Returns:
            Their metadata, or None where there are none.
        """
        folder = self.folder(CORPUS)
        for place in (folder, self.root / PREVIOUS / folder.name):
            try:
                found = load_factors(place)
            except InputError:
                continue
            same = all(found.metadata.get(key) == value for key, value in metadata.items() if key != "world_size")
            if same and list(found) == layers:
                self.factors = self._read(place)
                return found.metadata
        return None

    def bring_back(self) -> None:
        """Beginning a run puts the outputs of the one before it aside, also the factors that stay in use."""
        folder = self.folder(CORPUS)
        aside = self.root / PREVIOUS / folder.name
        if self.factors and self.writes and not folder.exists() and aside.exists():
            aside.rename(folder)


def on_host(factors: Mapping[str, KroneckerFactors]) -> dict[str, KroneckerFactors]:
    """The same in the CPU's memory, which further passes leave alone; what is shared stays shared."""
    moved: dict[str, KroneckerFactors] = {}
    for name, leader in input_leaders(factors).items():
        layer = factors[name]
        A = moved[leader].A if leader in moved else _on_host(layer.A)
        moved[name] = KroneckerFactors(A, _on_host(layer.G), layer.n_tokens)
    return moved


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.cpu()


def _equal(a: KroneckerFactors, b: KroneckerFactors) -> bool:
    """Whether what is on the disk is what this rank has; of another rank's layer it has nothing."""
    return a.n_tokens == b.n_tokens and (b.A.is_meta or (a.A.equal(b.A) and a.G.equal(b.G)))
