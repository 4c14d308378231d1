"""Bergson's runs."""

import pytest
from safetensors.torch import save_file

from lightning_kfac import InputError
from lightning_kfac.factors.foreign.read import read_foreign
from tests.factors.foreign.common import EYE, LAYERS, N, assert_equal, write_bergson


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bergson(tmp_path, samples, expected, ranks, bias):
    config = "steps:\n- hessian:\n    hessian_cfg: {method: kfac, use_dataset_labels: false}\n"
    config += "    index_cfg: {loss_reduction: sum}\nmetadata: {}\n"
    write_bergson(tmp_path, samples, ranks, bias, config)
    found, metadata = read_foreign(tmp_path)
    assert_equal(found, expected)
    assert metadata["imported_from"] == "bergson"
    assert metadata["notes"].startswith("labels: sampled; method: kfac; loss_reduction: sum")


def test_bergson_without_a_count_needs_one(tmp_path, samples, expected):
    write_bergson(tmp_path, samples, 2, count=None)
    with pytest.raises(InputError, match=r"no total_processed\.pt; the factors are sums, so give n_tokens"):
        read_foreign(tmp_path)
    found, metadata = read_foreign(tmp_path, n_tokens=N)
    assert_equal(found, expected)
    assert metadata["notes"].startswith("labels: unknown; method: unknown")


def test_damaged_bergson_runs(tmp_path, samples):
    write_bergson(tmp_path, samples, 3)
    (tmp_path / "activation_sharded" / "shard_2.safetensors").unlink()
    with pytest.raises(InputError, match=r"A has shape \[4, 6\], it must be square; is a shard missing"):
        read_foreign(tmp_path)
    (tmp_path / "gradient_sharded" / "shard_0.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_foreign(tmp_path)
    narrow = {name.removeprefix("model."): EYE.clone() for name in LAYERS.values()}
    save_file(narrow, tmp_path / "activation_sharded" / "shard_1.safetensors")
    with pytest.raises(InputError, match="do not fit together"):
        read_foreign(tmp_path)
    write_bergson(tmp_path / "b", samples, config="steps:\n- hessian: {hessian_cfg: {method: tkfac}, index_cfg: {}}\n")
    with pytest.raises(InputError, match="method tkfac gives no K-FAC factors"):
        read_foreign(tmp_path / "b")
    (tmp_path / "b" / "config.yaml").write_text("steps: [")
    with pytest.raises(InputError, match=r"config.yaml: cannot be read"):
        read_foreign(tmp_path / "b")
    (tmp_path / "b" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"total_processed.pt is 30, not 31"):
        read_foreign(tmp_path / "b", n_tokens=31)
