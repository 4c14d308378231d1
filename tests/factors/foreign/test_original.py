"""Files of the original tool and of its replication."""

import pytest

from lightning_kfac import InputError, KroneckerFactors
from lightning_kfac.factors.foreign.read import read_foreign
from tests.factors.foreign.common import N, assert_equal, write_original, write_replication


@pytest.mark.parametrize("kind", ["auto", "original"])
def test_original(tmp_path, expected, kind):
    write_original(tmp_path / "kfac_factors_blk_2.pt", expected)
    found, metadata = read_foreign(tmp_path / "kfac_factors_blk_2.pt", kind)
    assert_equal(found, expected)
    assert metadata["imported_from"] == "original" and metadata["source"] == str(tmp_path / "kfac_factors_blk_2.pt")
    assert "labels" in metadata["notes"] and "square" in metadata["notes"]


def test_original_folder(tmp_path, expected):
    write_original(tmp_path / "kfac_factors_blk_2.pt", expected, slice(0, 1))
    write_original(tmp_path / "kfac_factors_blk_2_3.pt", expected, slice(1, 2))
    (tmp_path / "meta_blk_2.json").write_text("{}")
    assert_equal(read_foreign(tmp_path, n_tokens=N)[0], expected)
    write_original(tmp_path / "kfac_factors_blk_9.pt", expected)
    with pytest.raises(InputError, match=r"gate_proj occurs twice"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("n_tokens", [None, N])
def test_replication(tmp_path, expected, n_tokens):
    write_replication(tmp_path / "kfac_statistics.pt", expected)
    expected = {name: KroneckerFactors(f.A, f.G, n_tokens or 0) for name, f in expected.items()}
    for path in (tmp_path, tmp_path / "kfac_statistics.pt"):
        found, metadata = read_foreign(path, n_tokens=n_tokens)
        assert_equal(found, expected)
        assert metadata["imported_from"] == "replication" and "token count" in metadata["notes"]
