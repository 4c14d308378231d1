"""Damaged, swapped, missing and half-written files: found out and named, or without any effect."""

import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_kfac.storage.files
from lightning_kfac import load_factors, save_factors
from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
from lightning_kfac.attention.storage import load_spectra, save_spectra
from lightning_kfac.editing.patch import apply_patch, save_patch
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.moments import load_moments
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import load_config, load_model, load_tokenizer
from lightning_kfac.storage.files import new_file, new_folder
from lightning_kfac.storage.json_files import read_json, write_json
from lightning_kfac.storage.tensor_files import load_tensors, read_header, save_tensors
from tests.forks import ROOT
from tests.storage.common import body_of, made_factors, read_all, same, save_all
from tests.tally import DAMAGED, KILLED, tally


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder to copy."""
    return save_all(tmp_path_factory.mktemp("whole") / "factors")


def test_flipped_bits_are_found_out(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "f")
    expected, chance = read_all(folder), random.Random(0)
    outcomes = {"named": 0, "no effect": 0}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        contents, body = path.read_bytes(), body_of(path)
        head = chance.sample(range(body), min(body, 50))
        for place in (*head, *(chance.randrange(body, len(contents)) for _ in range(25) if body < len(contents))):
            flipped = bytearray(contents)
            flipped[place] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            try:
                found = read_all(folder)
            except InputError as error:
                # A damaged basis is named by the moments that need it.
                assert str(path) in str(error) or str(path.parent) in str(error), (path, place, error)
                outcomes["named"] += 1
            else:
                assert same(found, expected), (path, place)
                assert place < body, (path, place)  # names that nothing reads, and spaces
                outcomes["no effect"] += 1
            path.write_bytes(contents)
            tally(DAMAGED)
    assert same(read_all(folder), expected)
    assert outcomes["named"] > 10 * outcomes["no effect"] and sum(outcomes.values()) > 600, outcomes


def test_cut_files_are_found_out(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "f")
    expected = read_all(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        contents = path.read_bytes()
        for length in (0, 1, 7, 8, 9, 60, len(contents) // 2, len(contents) - 2):
            path.write_bytes(contents[:length])
            tally(DAMAGED)
            with pytest.raises(InputError, match=re.escape(str(path.parent))):
                read_all(folder)
            path.write_bytes(contents)
        path.unlink()
        if path != folder / "moments" / "metadata.json":  # without it there are no moments
            with pytest.raises(InputError, match=re.escape(str(path.parent))):
                read_all(folder)
        path.write_bytes(contents)
    assert same(read_all(folder), expected)


def test_a_damaged_basis_is_computed_again(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "f")
    expected = read_all(folder)
    shutil.rmtree(folder / "moments")
    for path in sorted((folder / "bases").iterdir()):
        contents = bytearray(path.read_bytes())
        contents[body_of(path) + 3] ^= 64
        path.write_bytes(contents)
    factors = load_factors(folder)
    for name in factors:
        for side, spectrum in zip("GA", BasisCache.beside(factors).of(factors, name), strict=True):
            assert torch.equal(spectrum.vectors, expected[f"{name} {side} vectors"])


def test_swapped_files_are_found_out(whole, tmp_path):
    for inside in (".", "moments", "bases"):
        folder = shutil.copytree(whole, tmp_path / f"{inside}/f")
        one, other, *_ = sorted((folder / inside).glob("*.safetensors"), key=lambda p: (-p.stat().st_size, p.name))
        assert one.stat().st_size == other.stat().st_size
        place = tmp_path / "aside"
        one.rename(place)
        other.rename(one)
        tally(DAMAGED)
        place.rename(other)
        with pytest.raises(InputError, match=re.escape(str(folder))):
            read_all(folder)


def test_older_folders_without_checksums_are_read(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "f")
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path)
    about = json.loads((folder / "metadata.json").read_text())
    del about["checksum"]
    for entry in about["layers"].values():
        del entry["checksum"]
    (folder / "metadata.json").write_text(json.dumps(about))
    about = json.loads((folder / "moments" / "metadata.json").read_text())
    layers = {name: {key: entry[key] for key in ("file", "bases")} for name, entry in about["layers"].items()}
    (folder / "moments" / "metadata.json").write_text(json.dumps({"moments": "token", "layers": layers}))
    assert same(read_all(folder), read_all(whole))


def changed(folder: Path, layer: dict | None = None, **fields) -> Path:
    """Rewrites metadata with a right checksum: what somebody wrote, not what a disk has lost."""
    path = folder / "metadata.json"
    contents = read_json(path, "")
    contents["layers"]["first"] |= layer or {}
    drop = object()
    contents = {k: v for k, v in (contents | fields).items() if v is not drop}
    write_json(path, contents)
    return folder


@pytest.mark.parametrize("size", [0, -6, 7, 10**9, 10**30, 6.0, True, "6", None, [6], {}])
@pytest.mark.parametrize("name", ["d_in", "d_out", "n_tokens"])
def test_claimed_sizes_are_compared_before_memory_is_taken(whole, tmp_path, name, size):
    folder = changed(shutil.copytree(whole, tmp_path / "f"), {name: size})
    if name == "n_tokens" and size in (0, 7, 10**9) and type(size) is int:
        assert load_factors(folder)["first"].n_tokens == size
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, limits[1]))
    try:
        with pytest.raises(InputError, match=r"damaged or incomplete: .*; collect the factors again"):
            load_factors(folder)["first"]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": []},
        {"layers": {"first": 3}},
        {"layers": {"first": {}}},
        {"layers": None},
        {"model": 3},
        {"fingerprint": ["a"]},
        {"n_tokens": "many"},
        {"format": True},
        {"format": 1.0},
    ],
)
def test_wrong_fields_are_named(whole, tmp_path, fields):
    folder = changed(shutil.copytree(whole, tmp_path / "f"), **fields)
    with pytest.raises(InputError, match=next(iter(fields)).rstrip("s")):
        load_factors(folder)


def test_no_path_leads_out_of_the_folder(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "f")
    shutil.copytree(whole, tmp_path / "f" / "inner")
    shutil.copytree(whole, tmp_path / "other")
    tricks = ["../other/layer_0000.safetensors", f"{tmp_path}/other/layer_0000.safetensors", "..", ".", "",
              "inner/layer_0000.safetensors", "..\\other", "layer_0000.safetensors\0", "/dev/zero"]  # fmt: skip
    moments = read_json(folder / "moments" / "metadata.json", "")
    for file in tricks:
        with pytest.raises(InputError, match=r"f/metadata.json: damaged"):
            load_factors(changed(folder, {"A": f"{file}:A", "checksum": None}))
        moments["layers"]["first"] |= {"file": file, "checksum": None}
        write_json(folder / "moments" / "metadata.json", moments)
        factors = load_factors(whole)
        with pytest.raises(InputError, match=r"moments/metadata.json: damaged"):
            load_moments(folder, factors, BasisCache.beside(factors), "first")


def test_links_are_followed(whole, tmp_path):
    """A snapshot in the cache of the Hugging Face hub is a folder of links to files elsewhere."""
    blobs = shutil.copytree(whole, tmp_path / "blobs")
    for path in sorted(blobs.rglob("*")):
        link = tmp_path / "snapshot" / path.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            link.symlink_to(path)
    assert same(read_all(tmp_path / "snapshot"), read_all(whole))


def test_pipes_and_folders_in_place_of_files(whole, tmp_path):
    for number, file in enumerate(("metadata.json", "layer_0000.safetensors", "moments/layer_0001.safetensors")):
        for make in (os.mkfifo, os.mkdir):
            folder = shutil.copytree(whole, tmp_path / f"{number}{make.__name__}")
            (folder / file).unlink()
            make(folder / file)
            with pytest.raises(InputError, match=r"no such file|not a factor folder"):
                read_all(folder)


def test_headers_that_claim_more_than_there_is(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors({"G": torch.zeros(3)}, path)
    contents = path.read_bytes()
    large = contents.replace(b"[3]", b"[9]").replace(b"[0,12]", b"[0,36]")
    assert large != contents
    for damaged in (large, struct.pack("<Q", 2**62) + contents[8:], struct.pack("<Q", 90_000_000) + contents[8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"t.safetensors: damaged or incomplete: .*; begin anew"):
            load_tensors(path, "begin anew")


def test_every_dtype_and_shape_survives(tmp_path):
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3), "none": torch.zeros(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    checksum = save_tensors(tensors, tmp_path / "t.safetensors", {"step": "7"})
    found = load_tensors(tmp_path / "t.safetensors", "", checksum=checksum)
    assert same(found, tensors) and all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert read_header(tmp_path / "t.safetensors", "").metadata["step"] == "7"
    assert list(load_tensors(tmp_path / "t.safetensors", "", {"none": (0, 4)})) == ["none"]
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644


def test_damaged_patches_and_residuals_are_named(tmp_path):
    model = torch.nn.Sequential()
    model.fc = torch.nn.Linear(4, 3)
    before = weights_fingerprint(model, ["fc"])
    old = model.fc.weight.detach().clone()
    torch.nn.init.ones_(model.fc.weight)
    save_patch(model, ["fc"], tmp_path / "patch", before, {"model": "demo"})
    model.fc.weight.data.copy_(old)
    moments = torch.eye(2).double()[None]
    save_spectra(ResidualSpectra({3: HeadSpectra(moments, torch.zeros(1), torch.ones(1))}), tmp_path / "residuals")
    readers = {
        "patch": lambda: apply_patch(model, tmp_path / "patch"),
        "residuals": lambda: load_spectra(tmp_path / "residuals"),
    }
    for folder, read in readers.items():
        for path in sorted(p for p in (tmp_path / folder).iterdir() if p.suffix != ".md"):  # the card is for people
            contents = path.read_bytes()
            for place in (2, len(contents) // 2, len(contents) - 3):
                damaged = bytearray(contents)
                damaged[place] ^= 4
                path.write_bytes(damaged)
                tally(DAMAGED)
                with pytest.raises(InputError, match=re.escape(f"{path}: damaged or incomplete")):
                    read()
                assert torch.equal(model.fc.weight, old)
            path.write_bytes(contents)
    for read in readers.values():
        read()
    assert torch.equal(model.fc.weight, torch.ones(3, 4))


def in_child(work) -> str:
    """Runs something in a copy of this process; returns its outcome, or the signal that ended it."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(reader)
        try:
            work()
            said = "done"
        except InputError as error:
            said = f"InputError: {error}"
        except BaseException as error:
            said = repr(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return said
    tally(KILLED)
    return signal.Signals(os.WTERMSIG(status)).name


def killed_at(step: int, work) -> str:
    """Runs something and kills it before the given step that a disk sees."""
    steps = iter(range(step + 1))

    def counted(function):
        def call(*args, **kwargs):
            if next(steps, None) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def child():
        for name in ("rename", "replace", "mkdir", "unlink", "write_text", "chmod"):
            setattr(Path, name, counted(getattr(Path, name)))
        lightning_kfac.storage.files.sync = counted(lightning_kfac.storage.files.sync)
        lightning_kfac.storage.files.shutil.rmtree = counted(shutil.rmtree)
        work()

    return in_child(child)


def test_a_kill_at_any_step_leaves_the_older_or_the_new_factors(tmp_path):
    path = tmp_path / "f"
    older, new = made_factors(1), made_factors(2)
    seen = []
    for step in range(200):
        save_factors(older, path)
        outcome = killed_at(step, lambda: save_factors(new, path))
        found = load_factors(path)
        n_tokens = found["first"].n_tokens
        expected = {11: older, 12: new}[n_tokens]
        for name, layer in expected.items():
            assert torch.equal(found[name].A, layer.A) and torch.equal(found[name].G, layer.G)
        seen.append(n_tokens)
        if outcome == "done":
            break
        assert outcome == "SIGKILL"
    assert seen == sorted(seen) and seen[0] == 11 and seen[-1] == 12 and len(seen) > 20
    save_factors(older, path)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]  # what the kills have left is gone


def test_an_error_in_between_leaves_the_older_folder(tmp_path):
    path = tmp_path / "f"
    save_factors(made_factors(1), path)

    for error in (KeyError("x"), KeyboardInterrupt(), OSError(5, "Input/output error")):
        with pytest.raises(type(error)), new_folder(path) as partial:
            (partial / "half").write_text("half")
            raise error
        assert load_factors(path)["first"].n_tokens == 11
        with pytest.raises(type(error)), new_file(path / "metadata.json") as partial:
            partial.write_text("half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and not list(path.glob("*.part*"))
    assert load_factors(path)["first"].n_tokens == 11


def test_files_above_the_allowed_size(tmp_path):
    path = tmp_path / "f"
    save_factors(made_factors(1), path)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save_factors(made_factors(2, size=100), path)

    place, why = f"{tmp_path}/f.part/layer_0000.safetensors", "files of this size are not allowed (ulimit -f)"
    said = f"InputError: {place}: cannot be written: {why}; raise the limit, then run the same command again"
    assert in_child(save) == said
    assert load_factors(path)["first"].n_tokens == 11 and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], timeout=20, check=True)


def test_a_full_disk(small_disk):
    path = small_disk / "f"
    save_factors(made_factors(1), path)
    for size in (300, 700):  # the disk is full at the third layer, or at the first
        with pytest.raises(InputError, match="cannot be written: no space left on the device; free some, then run"):
            save_factors(made_factors(2, size=size), path)
        assert load_factors(path)["first"].n_tokens == 11 and [p.name for p in small_disk.iterdir()] == ["f"]
    factors = load_factors(path)
    (small_disk / "filler").write_bytes(bytes(256 * 1024 - 4096 * 12))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "more").write_bytes(bytes(256 * 1024))
    bases = BasisCache.beside(factors)  # where it cannot be written, the basis is kept in memory
    assert torch.equal(bases.of(factors, "first")[0].vectors, BasisCache().of(factors, "first")[0].vectors)
    with pytest.raises(InputError, match="no space left on the device"):
        write_json(path / "metadata.json", {"long": "x" * 2**18})
    assert load_factors(path)["first"].n_tokens == 11


def test_nothing_is_unpickled():
    forbidden = (
        r"torch\.load\(|pickle\.|import pickle|np\.load\(|yaml\.\w*load\(|(?<![.\w])(eval|exec)\(|joblib|marshal"
    )
    safe = ("weights_only=True", "allow_pickle=False", "yaml.safe_load(")
    found = [
        line.strip()
        for path in [*(ROOT / "lightning_kfac").rglob("*.py"), ROOT / "train.py", ROOT / "edit.py"]
        for line in path.read_text("utf-8").splitlines()
        if re.search(forbidden, line)
    ]
    assert not [line for line in found if not any(word in line for word in safe) and not line.startswith(">>>")]
    assert sum("torch.load(" in line for line in found) == 1  # other tools' files, tensors only


def test_code_of_repositories_does_not_run_unasked(tmp_path):
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(InputError):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    for path in sorted((ROOT / "lightning_kfac").rglob("*.py")):
        assert not re.search(r"trust_remote_code(: bool)?\s*=\s*True", path.read_text("utf-8")), path
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert "trust_remote_code: true" not in path.read_text("utf-8"), path
