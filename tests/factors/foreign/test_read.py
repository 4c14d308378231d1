"""Other tools' factor files, told apart by their layouts: names, low precision, damage, and wrong contents."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from lightning_kfac import InputError, KFACEditor, collect_factors, load_factors, save_factors
from lightning_kfac.factors.foreign.read import read_foreign
from tests.common import assert_same, batched, build_model
from tests.factors.foreign.common import EYE, write_bergson, write_kronfluence, write_replication


def test_layer_names_of_other_families(tmp_path, samples, expected):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    found, _ = read_foreign(tmp_path, layer_pattern="transformer.h.{block}.ffn.{projection}")
    assert list(found) == ["transformer.h.2.ffn.gate", "transformer.h.2.ffn.up"]
    write_bergson(tmp_path / "b", samples)
    found, _ = read_foreign(tmp_path / "b", layer_pattern="transformer.h.{block}.mlp.{projection}")
    assert list(found) == ["transformer.layers.2.mlp.gate_proj", "transformer.layers.2.mlp.up_proj"]


def test_low_precision_sums_are_made_symmetric(tmp_path, expected):
    A = next(iter(expected.values())).A
    wobbly = A + 1e-4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"layer_0.up_proj": (wobbly, A.bfloat16())}, tmp_path / "kfac_statistics.pt")
    (layer,) = read_foreign(tmp_path)[0].values()
    torch.testing.assert_close(layer.A, (wobbly + wobbly.T) / 2)
    assert torch.equal(layer.G, A.bfloat16().float())


def test_imported_factors_are_saved_and_edit_a_model(tmp_path, rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3))
    by_block = {
        f"layer_{name.split('.')[2]}.{name.rpartition('.')[2]}": (f.A.clone(), f.G) for name, f in factors.items()
    }
    torch.save(by_block, tmp_path / "kfac_statistics.pt")
    found, metadata = read_foreign(tmp_path, n_tokens=53)
    assert_same(found, factors, 1e-7)
    save_factors(found, tmp_path / "factors", metadata)
    loaded = load_factors(tmp_path / "factors")
    assert loaded.metadata["imported_from"] == "replication"
    assert loaded.shared_A("model.layers.0.mlp.gate_proj") == loaded.shared_A("model.layers.0.mlp.up_proj")
    assert KFACEditor(model, loaded).apply().fraction_kept < 1


def save_pt(folder, contents, name="kfac_statistics.pt"):
    torch.save(contents, folder / name)
    return folder / name


NAN = torch.full((3, 3), float("nan"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"layer_0.up_proj": (EYE, torch.ones(3, 2))}, r"layer_0.up_proj: G has shape \[3, 2\], it must be square"),
        ({"layer_0.up_proj": (torch.ones(0, 0), EYE)}, r"A has shape \[0, 0\]"),
        ({"layer_0.up_proj": (EYE.triu() + torch.ones(3, 3).triu(), EYE)}, "not symmetric"),
        ({"layer_0.up_proj": (-EYE, EYE)}, "negative on the diagonal"),
        ({"layer_0.up_proj": (NAN, EYE)}, "not finite"),
        ({"layer_0.up_proj": (EYE.long(), EYE)}, "not a dense tensor of real numbers"),
        ({"layer_0.up_proj": (EYE.to_sparse(), EYE)}, "not a dense tensor of real numbers"),
        ({"layer_0.up_proj": EYE}, r"not a pair \(A, G\)"),
        ({"layer_0.up_proj": (EYE, EYE), "step": 3}, r"key 'step' is not one of the replication layout"),
        ({"blk0.up": {"A": EYE, "G": EYE}}, "blk0.up is not a dict of A, G and n_tokens"),
        ({"blk0.up": (EYE, EYE)}, "blk0.up is not a dict of A, G and n_tokens"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 0}}, "must be a positive whole number"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 2.5}}, "must be a positive whole number"),
        ({"blk0.up": {"A": EYE, "G": EYE, "n_tokens": 7}}, "n_tokens is 7, not 10; leave n_tokens out"),
        ({"weight": EYE}, "none of the known layouts .original:.*replication:.*kronfluence:.*bergson:"),
        ({}, "none of the known layouts"),
        ([EYE], "holds a list, not a dict"),
    ],
)
def test_wrong_contents(tmp_path, contents, message):
    path = save_pt(tmp_path, contents)
    with pytest.raises(InputError, match=message) as caught:
        read_foreign(path, n_tokens=10)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Arbitrary:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_of_anything_else_are_refused(tmp_path, capsys):
    path = tmp_path / "kfac_statistics.pt"
    torch.save({"layer_0.up_proj": Arbitrary()}, path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"layer_0.up_proj": Arbitrary()}, protocol=2))
    for bad in (path, tmp_path / "plain.pt"):
        with pytest.raises(InputError, match="damaged or holds more than tensors"):
            read_foreign(bad)
    assert "executed" not in capsys.readouterr().out


def test_damaged_files(tmp_path, samples, expected):
    path = tmp_path / "kfac_statistics.pt"
    write_replication(path, expected)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="damaged"):
        read_foreign(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        read_foreign(tmp_path, "replication")
    write_kronfluence(tmp_path / "k", samples)
    file = tmp_path / "k" / "gradient_covariance.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"gradient_covariance.safetensors: cannot be read"):
        read_foreign(tmp_path / "k")
    save_file({"other": EYE}, file)
    with pytest.raises(InputError, match=r"gradient_covariance.safetensors: cannot be read \(.*gate_proj"):
        read_foreign(tmp_path / "k")
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_foreign(tmp_path / "k")


def test_wrong_arguments(tmp_path, expected):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("A")
    for path, options, message in [
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "none of the known layouts"),
        (tmp_path / "notes.txt", {}, "none of the known layouts"),
        (tmp_path / "empty", {"kind": "original"}, "holds no layer"),
        (tmp_path, {"kind": "kronfluence"}, "activation_covariance.safetensors: cannot be read"),
        (tmp_path, {"kind": "bergson"}, "give n_tokens"),
        (tmp_path / "kfac_statistics.pt", {"kind": "original"}, "not one of the original layout"),
        (tmp_path / "kfac_statistics.pt", {"kind": "kronfluence"}, "cannot be read"),
        (tmp_path, {"kind": "curvlinops"}, "choose auto, original, replication, kronfluence, bergson"),
        (tmp_path, {"n_tokens": 0}, "must be positive"),
        (tmp_path, {"layer_pattern": "model.{block}"}, r"lacks \{block\} or \{projection\}"),
    ]:
        with pytest.raises(InputError, match=message):
            read_foreign(path, **options)
    (tmp_path / "empty" / "activation_covariance_data_partition0_module_partition0.safetensors").touch()
    with pytest.raises(InputError, match="aggregate_covariance_matrices"):
        read_foreign(tmp_path / "empty")
