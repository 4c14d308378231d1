"""What a corpus may be made of."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.corpus import Corpus


def test_hub_files_are_listed_by_the_data_set_builder(mixture):
    """The same call that lists a hub data set, on a folder: each file becomes a stream of its own."""
    files = Corpus.parse(str(mixture))._hub_files()
    assert sorted(f.rpartition("/")[2] for f in files) == ["shard-0.json.gz", "shard-0.jsonl.zst"]


def test_aliases_of_the_original_tool():
    assert Corpus.parse("dolmo").source == "allenai/dolmino-mix-1124"
    assert Corpus.parse("olmo").source == "allenai/olmo-mix-1124"
    assert Corpus.parse("embedded", "heldout") == Corpus(embedded=True, split="heldout")


def test_wrong_corpora(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        Corpus.parse(str(tmp_path / "nothing")).check()
    with pytest.raises(InputError, match="the folder holds no"):
        Corpus.parse(str(tmp_path)).check()
    for wrong in (Corpus(), Corpus(embedded=True, source="x")):
        with pytest.raises(InputError, match="either `embedded: true` or a `source`"):
            Corpus.parse(wrong)
    with pytest.raises(InputError, match="splits"):
        Corpus.parse(Corpus(embedded=True, split="test"))
