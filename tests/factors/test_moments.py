"""Moments and the bases that they were measured in."""

import json

import pytest
from safetensors.torch import load_file

from lightning_kfac import EditConfig, InputError, KFACEditor, load_factors
from lightning_kfac.cli.train import main
from lightning_kfac.models.loading import load_model
from lightning_kfac.storage.tensor_files import read_header, save_tensors
from tests.common import small


def test_moments_of_another_basis_are_refused(tmp_path, few):
    main(["fit", *small(tmp_path, few, **{"collect.moments": "token"})])
    factors, model = load_factors(tmp_path / "factors"), load_model("demo", "float32")
    config = EditConfig(formula="corrected")
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config, dtype="float32").apply()
    KFACEditor(model, factors, config).apply(dry_run=True)
    for file in (tmp_path / "factors" / "bases").iterdir():
        file.unlink()
    KFACEditor(model, factors, config).apply(dry_run=True)  # computed again to the last bit
    bases = list((tmp_path / "factors" / "bases").iterdir())
    for file in bases:  # as whole, and as good a basis as the one before
        tensors, metadata = load_file(file), read_header(file, "").metadata
        tensors["vectors"][:, 0] *= -1
        save_tensors(tensors, file, metadata)
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config).apply()
    # Moments of older versions do not say which bits they mean: only a basis that was not computed since then.
    about = tmp_path / "factors" / "moments" / "metadata.json"
    older = json.loads(about.read_text())
    older = {
        "moments": "token",
        "layers": {n: {k: e[k] for k in ("file", "bases")} for n, e in older["layers"].items()},
    }
    about.write_text(json.dumps(older))
    KFACEditor(model, factors, config).apply(dry_run=True)
    for file in bases:
        file.unlink()
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config).apply()
