"""What a collection has found so far, in memory and in the run's folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kfac.callbacks.collection.passes import Pass
from lightning_kfac.data.names import CORPUS
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import load_factors, save_factors, stored_sides
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.factors.moments import load_moments, save_moments
from lightning_kfac.factors.sharded import save_sharded
from lightning_kfac.storage.files import new_folder
from lightning_kfac.storage.manifest import Manifest
from lightning_kfac.storage.run_folder import FACTORS, PREVIOUS
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

MOMENTS_FILE = "moments.safetensors"
ADVICE = "collect again"


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
        self.root = root
        self.writes = writes
        self.factors: dict[str, KroneckerFactors] = {}
        self.domain_factors: dict[str, dict[str, KroneckerFactors]] = {}
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.owners: dict[str, int] | None = None
        self.bases = BasisCache(root / FACTORS / "bases" if writes else None)

    def factors_of(self, text: str) -> dict[str, KroneckerFactors]:
        """Factors of the corpus or of a domain, as far as they are found."""
        return self.factors if text == CORPUS else self.domain_factors.setdefault(text, {})

    def moments_of(self, text: str) -> dict[str, Tensor]:
        """Moments of the corpus or of a domain, as far as they are found."""
        return self.moments.setdefault(text, {})

    def add(self, work: Pass, results: Mapping[str, Any]) -> None:
        """Takes what a pass has found: moments, or factors."""
        if work.moments:
            self.moments_of(work.text).update(results)
        else:
            self.factors_of(work.text).update(results)

    def count(self, work: Pass) -> int:
        """Layers for which the passes of this kind over this text have found something."""
        return len(self.moments_of(work.text) if work.moments else self.factors_of(work.text))

    def folder(self, text: str) -> Path:
        """Where the factors of a text are."""
        return self.root / FACTORS if text == CORPUS else self.root / "domains" / text

    def save_factors(self, text: str, metadata: Mapping[str, Any]) -> None:
        """Writes the factors that all passes over a text have found."""
        self._save(self.factors_of(text), self.folder(text), metadata)

    def save_moments(self, text: str, kind: str) -> None:
        """Writes the moments that all passes over a text have found.

        Args:
            text: The corpus or a domain.
            kind: ``token`` or ``sequence``.
        """
        if self.writes:
            save_moments(self.moments_of(text), self.folder(text), self.factors, self.bases, kind)

    def _save(self, factors: dict[str, KroneckerFactors], folder: Path, metadata: Mapping[str, Any]) -> None:
        ranks = current_ranks()
        if self.owners is not None and not all(ranks.gather(self._is_there(folder, factors, metadata))):
            save_sharded(factors, folder, metadata, ranks, self.owners)
        elif self.owners is None and self.writes and not self._is_there(folder, factors, metadata):
            save_factors(factors, folder, metadata)

    @staticmethod
    def _is_there(folder: Path, ours: dict[str, KroneckerFactors], metadata: Mapping[str, Any]) -> bool:
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
        if not work.moments:
            factors = self.factors_of(work.text)
            self._save({name: factors[name] for name in work.layers}, folder, {})
        elif self.writes:
            moments = self.moments_of(work.text)
            with new_folder(folder) as partial:
                save_tensors({name: moments[name] for name in work.layers}, partial / MOMENTS_FILE)

    def load_part(self, work: Pass, folder: Path) -> None:
        """Reads what one pass has found: from ``save_part``, or where all of the whole text was saved."""
        if work.moments:
            self.moments_of(work.text).update(self._moments_part(work, folder))
        else:
            found = self._read(folder if folder.is_dir() else self.folder(work.text))
            self.factors_of(work.text).update({name: found[name] for name in work.layers})

    def _moments_part(self, work: Pass, folder: Path) -> dict[str, Tensor]:
        if folder.is_dir():
            found = load_tensors(folder / MOMENTS_FILE, ADVICE)
            return {name: found[name] for name in work.layers}
        place = self.folder(work.text)
        parts: dict[str, Tensor] = {}
        for name in work.layers:
            moments = load_moments(place, self.factors, self.bases, name)
            if moments is None:
                raise InputError(f"{place}: the moments of the interrupted collection are not there; {ADVICE}")
            parts[name] = moments
        return parts

    def _read(self, folder: Path) -> dict[str, KroneckerFactors]:
        """Every layer of a folder in memory; what is shared on disk is shared here, what another rank owns is empty."""
        stored = load_factors(folder)
        found: dict[str, KroneckerFactors] = {}
        inputs: dict[str, Tensor] = {}
        for name in stored:
            if self.owners is None or self.owners[name] == current_ranks().rank:
                layer = stored[name]
            else:
                d_out, d_in = stored.layer_shape(name)
                entry = stored.metadata["layers"][name]
                sizes = {"A": d_in, "G": d_out}
                empty = {s: torch.empty(sizes[s[0]], sizes[s[0]], device="meta") for s in stored_sides(entry)}
                layer = KroneckerFactors(n_tokens=entry["n_tokens"], **empty)
            found[name] = replace(layer, A=inputs.setdefault(stored.shared_A(name), layer.A))
        return found

    def reuse(self, metadata: Mapping[str, Any], layers: list[str]) -> dict[str, Any] | None:
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
            known = {"tokenizer_fingerprint": metadata.get("tokenizer_fingerprint"), **found.metadata}  # not in 0.1
            compared = {key: value for key, value in metadata.items() if key not in ("world_size", "n_documents")}
            same = all(known.get(key) == value for key, value in compared.items())
            if same and list(found) == layers:
                self.factors = self._read(place)
                return found.metadata
        return None

    def bring_back(self) -> None:
        """Beginning a run puts the outputs of the one before it aside, also the factors that stay in use."""
        folder = self.folder(CORPUS)
        aside = self.root / PREVIOUS / folder.name
        if self.factors and self.writes and not folder.exists() and aside.exists():
            manifest = Manifest(self.root)
            if manifest.kind is None:
                aside.rename(folder)
            else:
                manifest.move(f"{PREVIOUS}/{folder.name}", folder.name)


def _equal(a: KroneckerFactors, b: KroneckerFactors) -> bool:
    """Whether what is on the disk is what this rank has; of another rank's layer it has nothing."""
    if a.n_tokens != b.n_tokens or a.matrices.keys() != b.matrices.keys():
        return False
    return b.A.is_meta or all(matrix.equal(b.matrices[side]) for side, matrix in a.matrices.items())
