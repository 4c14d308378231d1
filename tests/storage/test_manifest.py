"""What is listed may be replaced and removed, and nothing else."""

import json
import os
import stat

import pytest

from lightning_kfac import load_factors, save_factors
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import new_file, new_folder
from lightning_kfac.storage.manifest import Entry, Manifest, remove_ours
from lightning_kfac.storage.tensor_files import save_tensors
from tests.storage.common import made_factors


def made(folder, kind="collection") -> Manifest:
    manifest = Manifest(folder)
    manifest.create(kind)
    return manifest


def write(path, text="ours"):
    with new_file(path) as partial:
        partial.write_text(text)


def test_what_is_written_is_listed_with_its_checksum_and_removed(tmp_path):
    manifest = made(tmp_path)
    write(tmp_path / "results.jsonl")
    save_factors(made_factors(), tmp_path / "factors")
    (tmp_path / "factors" / "notes.txt").write_text("mine")
    (tmp_path / "corpus.part1.jsonl").write_text("mine")
    assert manifest.entries["results.jsonl"].size == 4 and len(manifest.entries["results.jsonl"].sha256) == 64
    assert {"factors/metadata.json", "factors/layer_0000.safetensors"} <= manifest.entries.keys()
    with pytest.raises(InputError, match=r"factors/notes.txt: no run of this program wrote it; move it away"):
        manifest.check("factors", "results.jsonl")
    for name in ("factors", "results.jsonl", "corpus.part1.jsonl"):
        manifest.remove(name)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "corpus.part1.jsonl", "manifest.jsonl", "notes.txt",
    ]  # fmt: skip


def test_a_file_that_somebody_changed_is_theirs(tmp_path):
    manifest = made(tmp_path)
    write(tmp_path / "config.yaml", "seed: 0")
    manifest.check("config.yaml")
    (tmp_path / "config.yaml").write_text("seed: 7")
    with pytest.raises(InputError, match=r"config.yaml: somebody has changed it since it was written"):
        manifest.check("config.yaml")


def test_foreign_files_are_not_replaced(tmp_path):
    made(tmp_path)
    (tmp_path / "metadata.json").write_text("mine")
    (tmp_path / "factors").mkdir()
    (tmp_path / "factors" / "layer_0000.safetensors").write_text("mine")
    for work in (lambda: write(tmp_path / "metadata.json"), lambda: save_factors(made_factors(), tmp_path / "factors")):
        with pytest.raises(InputError, match="in the way, and no run of this program wrote it"):
            work()
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"new.part: in the way"), new_folder(tmp_path / "new"):
        pass
    assert all(p.read_text() == "mine" for p in tmp_path.rglob("*") if p.is_file() and p.name != "manifest.jsonl")


def test_a_folder_of_somebody_else_is_not_replaced_without_a_manifest_either(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="home: is there already, and this program did not write it"):
        save_factors(made_factors(), tmp_path / "home")
    (tmp_path / "f.part").mkdir()
    (tmp_path / "f.part" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"f.part: is there already"):
        save_factors(made_factors(), tmp_path / "f")
    assert (tmp_path / "home" / "thesis.txt").exists() and (tmp_path / "f.part" / "thesis.txt").exists()
    # What a Trainer of the user's removes at the end of a collection.
    state = tmp_path / "state"
    (state / "step-0000000003").mkdir(parents=True)
    (state / "step-0000000003" / "rank-00000.safetensors").write_text("ours")
    (state / "thesis.txt").write_text("mine")
    remove_ours(state)
    assert [p.name for p in state.iterdir()] == ["thesis.txt"]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    manifest = made(tmp_path / "run")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "rank-0.jsonl").write_text("mine")
    manifest.add({"state": Entry("folder")})
    (tmp_path / "run" / "state").symlink_to(tmp_path / "away")
    with pytest.raises(InputError, match="state: no run of this program wrote it"):
        manifest.check("state")
    manifest.remove("state")
    assert (tmp_path / "away" / "rank-0.jsonl").exists()


def test_what_a_kill_leaves_is_removed_and_what_looks_like_it_stays(tmp_path):
    manifest = made(tmp_path)
    manifest.announce(tmp_path / "data" / "a.tokens", tmp_path / "data" / "a.tokens.part0badcafe")
    (tmp_path / "data").mkdir()
    for name in ("a.tokens.part0badcafe", "a.tokens.part12345678"):
        (tmp_path / "data" / name).write_text("half")
    manifest.remove_parts()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["a.tokens.part12345678"]


def test_a_list_that_a_kill_cut_off_goes_on(tmp_path):
    manifest = made(tmp_path)
    manifest.add({"a": Entry()})
    whole = manifest.path.read_bytes()
    for length in range(len(whole) - 1, whole.index(b"\n"), -7):
        manifest.path.write_bytes(whole[:length])
        manifest.add({"b": Entry()})
        assert manifest.kind == "collection" and "b" in manifest.entries
    manifest.path.write_bytes(b"")
    assert manifest.kind is None
    manifest.create("sweep")
    assert manifest.kind == "sweep"


def test_other_programs_have_manifests_too(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    with pytest.raises(InputError, match=r"manifest.jsonl: this program did not write it"):
        made(tmp_path)
    write(tmp_path / "notes")  # nothing is listed there
    assert (tmp_path / "manifest.jsonl").read_text() == '{"audio_filepath": "a.wav"}\n'


def test_what_is_gone_is_forgotten(tmp_path):
    manifest = made(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "a").unlink()
    manifest.compact()
    assert manifest.entries.keys() == {"b"} and manifest.kind == "collection"
    assert [json.loads(line)["path"] for line in manifest.path.read_text().splitlines()[1:]] == ["b"]


@pytest.mark.parametrize("umask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        made(tmp_path)
        write(tmp_path / "a")
        save_factors(made_factors(), tmp_path / "factors")
        save_tensors({"x": load_factors(tmp_path / "factors")["first"].A}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(modes) == 7 and set(modes.values()) == {expected}, modes


def test_a_list_that_somebody_else_wrote_leads_nowhere(tmp_path):
    """Of a run's folder that came from elsewhere."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "draft.txt").write_text("mine")
    (run / "data").symlink_to(tmp_path / "papers")
    made(run)
    names = ["../thesis.txt", str(tmp_path / "thesis.txt"), "x/../../thesis.txt", "data/draft.txt", "./../thesis.txt"]
    with open(run / "manifest.jsonl", "a") as file:
        file.writelines(json.dumps({"path": name, "role": "part"}) + "\n" for name in names)
    manifest = Manifest(run)
    assert manifest.entries.keys() == {"data/draft.txt"}
    manifest.remove_parts()
    manifest.remove("data")
    assert (tmp_path / "thesis.txt").exists() and (tmp_path / "papers" / "draft.txt").exists()
    (run / "manifest.jsonl").write_text('{"manifest": 1, "kind": "\\u001b[31mred"}\n')
    assert Manifest(run).kind is None
