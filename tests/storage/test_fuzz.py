"""Thousands of damaged and hostile inputs: each ends in a clear error or in a result, soon, and writes nothing."""

import copy
import io
import json
import random
import shutil
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_kfac import load_factors
from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
from lightning_kfac.attention.storage import load_spectra, save_spectra
from lightning_kfac.cli.edit import make_parser
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TrainCLI
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.data.records import records_of
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import edit_details
from lightning_kfac.editing.patch import apply_patch, patch_source, save_patch
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.mining.log import MiningLog
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.results import read_results
from lightning_kfac.storage.yaml_files import check_config_files
from tests.storage.common import body_of, read_all, same, save_all
from tests.tally import MUTATED, tally

SECONDS = 10  # of one input, on a slow machine
# What a careless or hostile hand writes where something else belongs.
VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, 10**300, -(10**18), 0.0, 0.5, 1e308, float("inf"),
    float("nan"), "", " ", "x", "../x", "/etc/passwd", "/dev/zero", "..", "a:b", "layer_0000.safetensors:A",
    "layer_0001.safetensors:G", "layer_0009.safetensors:A", ":", "A", "\0", "\ud800", "é" * 50, "x" * 10_000, [], {},
    [1], [[]], {"a": 1}, ["a"] * 300, {"": None}, [None], [0.5, "x", {}],
]  # fmt: skip
# Raw texts in place of a value.
RAW = [
    "1" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "[" * 100_000, '{"a":' * 50_000, "[" * 400 + "]" * 400,
    "[" * 5000 + "]" * 5000, '"\\ud800"', '"\\u0000"', '"', "", "nul", "{}{}", "0x10", "1_000", "'x'", "// x",
]  # fmt: skip


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A hang is an error of a type that nobody expects."""

    def stop(*_):
        raise TimeoutError("an input took too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], object], names: str) -> object:
    """The result, or the InputError with a message fit to read; any other error passes, and fails the test."""
    tally(MUTATED)
    with within(SECONDS):
        try:
            return read()
        except InputError as error:
            message = str(error)
            assert names in message and 10 < len(message) < 12_000 and "Traceback" not in message
            message.encode("utf-8", "backslashreplace")
            return error


def mutated_bytes(contents: bytes, chance: random.Random) -> bytes:
    """One of: flipped bits, cut, emptied, doubled, spliced, noise."""
    kind, damaged = chance.randrange(9), bytearray(contents)
    place = chance.randrange(len(contents))
    if kind <= 2:
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    elif kind == 3:
        del damaged[place:]
    elif kind == 4:
        del damaged[place : place + chance.randrange(1, 30)]
    elif kind == 5:
        damaged[place:place] = chance.choice(
            [b"\0" * 9, b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 99, b'"']
        )
    elif kind == 6:
        damaged[place : place + 8] = chance.randbytes(8)
    elif kind == 7:
        damaged = damaged[place:] + damaged[:place]
    else:
        damaged = bytearray(
            chance.choice([b"", b"\0", b"\0" * 500, contents * 2, chance.randbytes(64), b"[]", b"null"])
        )
    return bytes(damaged)


def places_of(value, path=()) -> Iterator[tuple]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places_of(child, (*path, key))


def mutated_value(value: dict, chance: random.Random) -> dict:
    """A copy with one or two things inside replaced, removed, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2])):
        places = list(places_of(value))
        if not places:
            return {"x": chance.choice(VALUES)}
        *above, key = chance.choice(places)
        parent = value
        for step in above:
            parent = parent[step]
        kind = chance.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict) and key in parent:
            parent[str(chance.choice(["", "x", "format", "layers", "A", key + " "]))] = parent.pop(key)
        elif kind == 2 and isinstance(parent.get(key) if isinstance(parent, dict) else parent[key], int | float):
            number = parent[key]
            parent[key] = chance.choice([-number, number + 1, number * 1000, float(number), str(number), [number]])
        else:
            parent[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def mutated_json(value: dict, chance: random.Random) -> bytes:
    """JSON of a mutated value, or text that is nearly JSON."""
    if chance.random() < 0.75:
        return json.dumps(mutated_value(value, chance)).encode()
    text = json.dumps(value)
    *_, last = chance.choice(list(places_of(value)))
    mark = json.dumps(last) + ": "
    raw = chance.choice(RAW)
    if mark in text and chance.random() < 0.8:
        front, back = text.split(mark, 1)
        return f"{front}{mark}{raw}, {mark}{back}".encode() if chance.random() < 0.5 else f"{front}{mark}{raw}".encode()
    return raw.encode()


def listing(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_all(tmp_path_factory.mktemp("whole") / "factors")


# -- metadata and tensors -----------------------------------------------------------------------------------


def test_metadata(whole, tmp_path):
    """Also with a right checksum: what somebody wrote, not only what a disk has lost."""
    folder, chance = shutil.copytree(whole, tmp_path / "f"), random.Random(1)
    expected, before = read_all(folder), listing(folder)
    errors = 0
    for file in ("metadata.json", "moments/metadata.json"):
        path, contents = folder / file, (folder / file).read_bytes()
        value = json.loads(contents)
        for number in range(360):
            if number % 3 == 0:
                path.write_bytes(mutated_bytes(contents, chance))
            elif number % 3 == 1:
                path.write_bytes(mutated_json(value, chance))
            else:
                mutated = mutated_value({k: v for k, v in value.items() if k != "checksum"}, chance)
                path.unlink()
                write_json(path, mutated)
            found = outcome(lambda: read_all(folder), str(folder))
            errors += isinstance(found, InputError)
            if not isinstance(found, InputError):
                # What can be read agrees with the whole folder, but for what the metadata alone tell.
                for name, tensor in found.items():
                    known = [value for key, value in expected.items() if key.split()[1:] == name.split()[1:]]
                    alone = name.endswith(" n") or tensor is None
                    assert alone or any(torch.equal(tensor, value) for value in known), name
            path.write_bytes(contents)
    assert listing(folder) == before and errors > 450


def test_safetensors(whole, tmp_path):
    """Of factors, moments and bases, with checksums and, as older versions wrote them, without."""
    chance = random.Random(2)
    errors = 0
    for older in (False, True):
        folder = shutil.copytree(whole, tmp_path / f"older{older}")
        if older:
            about = json.loads((folder / "metadata.json").read_text())
            for entry in about["layers"].values():
                del entry["checksum"]
            del about["checksum"]
            (folder / "metadata.json").write_text(json.dumps(about))
        expected = read_all(folder)
        for file in ("layer_0000.safetensors", "moments/layer_0001.safetensors", "bases"):
            path = folder / file if file != "bases" else min((folder / "bases").iterdir())
            contents = path.read_bytes()
            for _ in range(110):
                path.write_bytes(mutated_tensors(contents, body_of(path), chance))
                found = outcome(partial(read_all, folder), str(folder))
                errors += isinstance(found, InputError)
                # What older versions wrote has no checksum: shapes are right, numbers may not be.
                assert isinstance(found, InputError) or older or same(found, expected)
                path.write_bytes(contents)
        assert same(read_all(folder), expected)
    assert errors > 450


def mutated_tensors(contents: bytes, body: int, chance: random.Random) -> bytes:
    """Mutations of a safetensors file: its length field, its header as JSON, any byte."""
    kind = chance.randrange(4)
    if kind == 0:
        length = chance.choice([0, 1, 7, body - 9, body - 7, body, len(contents), 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + contents[8:]
    if kind == 1:
        return mutated_bytes(contents, chance)
    head = contents[8:body]
    head = mutated_bytes(head, chance) if kind == 2 else mutated_json(json.loads(head), chance)
    return struct.pack("<Q", len(head)) + head + contents[body:]


def test_tensors_of_any_type(tmp_path, whole):
    """A well-formed file of an older version whose tensors are not what they should be."""
    folder = shutil.copytree(whole, tmp_path / "f")
    about = json.loads((folder / "metadata.json").read_text())
    del about["checksum"], about["layers"]["first"]["checksum"]
    (folder / "metadata.json").write_text(json.dumps(about))
    sizes = {"A": 21, "G": 36}
    kinds = (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
    for kind in kinds:
        save_file({name: torch.zeros(n).to(kind) for name, n in sizes.items()}, folder / "layer_0000.safetensors")
        assert isinstance(outcome(lambda: load_factors(folder)["first"], "layer_0000.safetensors"), InputError)
    for value in (float("nan"), float("inf"), -1.0):
        save_file({name: torch.full((n,), value) for name, n in sizes.items()}, folder / "layer_0000.safetensors")
        spectra = partial(BasisCache().of, load_factors(folder), "first")
        assert isinstance(outcome(spectra, "of first"), InputError)


def test_patches_and_residuals(tmp_path):
    chance = random.Random(3)
    model = torch.nn.Sequential()
    model.fc = torch.nn.Linear(4, 3)
    before = weights_fingerprint(model, ["fc"])
    old = model.fc.weight.detach().clone()
    torch.nn.init.ones_(model.fc.weight)
    save_patch(model, ["fc"], tmp_path / "patch", before, {"model": "demo", "layers": [{"name": "fc"}]})
    model.fc.weight.data.copy_(old)
    moments = torch.eye(2).double()[None]
    save_spectra(ResidualSpectra({3: HeadSpectra(moments, torch.zeros(1), torch.ones(1))}), tmp_path / "residuals")

    def patch():
        patch_source(tmp_path / "patch")
        apply_patch(model, tmp_path / "patch")
        edit_details(str(tmp_path / "patch"))
        return model.fc.weight.detach().clone()

    def residuals():
        return load_spectra(tmp_path / "residuals")[3].variances

    for folder, read, expected in (("patch", patch, torch.ones(3, 4)), ("residuals", residuals, torch.ones(1, 2))):
        for path in sorted(p for p in (tmp_path / folder).iterdir() if p.suffix != ".md"):  # the card is for people
            contents = path.read_bytes()
            for _ in range(150):
                if path.suffix == ".json":
                    mutate = chance.choice([mutated_bytes, lambda b, c: mutated_json(json.loads(b), c)])
                    path.write_bytes(mutate(contents, chance))
                else:
                    path.write_bytes(mutated_tensors(contents, body_of(path), chance))
                found = outcome(read, str(tmp_path / folder))
                if isinstance(found, InputError):
                    assert torch.equal(model.fc.weight, old)
                else:
                    assert torch.equal(found, expected)
                model.fc.weight.data.copy_(old)
                path.write_bytes(contents)


# -- JSON lines ---------------------------------------------------------------------------------------------


def letters(text: str, **options: bool) -> dict[str, list[int]]:
    """A tokenizer of bytes that refuses what a real one refuses."""
    ids = list(text.encode("utf-8"))
    return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


def mutated_lines(rows: list[dict], chance: random.Random) -> bytes:
    """A JSONL file with one to three damaged lines, or a damaged file."""
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(chance.randrange(1, 4)):
        number = chance.randrange(len(lines))
        lines[number] = mutated_json(rows[number], chance)
    contents = chance.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines) + chance.choice([b"\n", b""])
    return mutated_bytes(contents, chance) if chance.random() < 0.3 else contents


def test_memorized_sets_and_questions(tmp_path):
    chance, path = random.Random(4), tmp_path / "rows.jsonl"
    sets = [
        {"prefix_ids": [1, 2, 3], "suffix_ids": [4, 5]},
        {"prefix": "ab", "suffix": "cd"},
        {"prefix_ids": [65, 66], "suffix_ids": [67], "prefix": "AB", "suffix": "C"},
    ]
    asked = [
        {"prompt": "1+1=", "answer": "2"},
        {"prompt": "2+2=", "answer": 4},
        {"prompt": "3", "answer": "x #### 1,042"},
    ]
    results = {"error": 0, "read": 0}
    for number in range(900):
        skip = bool(number % 2)
        path.write_bytes(mutated_lines(sets, chance))
        found = outcome(lambda skip=skip: load_memorized(path, letters, 256, skip_bad_rows=skip), str(path))
        results["error" if isinstance(found, InputError) else "read"] += 1
        for row in found if isinstance(found, list) else ():
            assert row.prefix and row.suffix and all(0 <= i < 256 for i in (*row.prefix, *row.suffix))
        path.write_bytes(mutated_lines(asked, chance))
        questions = QuestionSet(str(path), answer_pattern=chance.choice([None, r"#### (.+)", r"(\d)(\d)?"]))
        found = outcome(lambda q=questions, skip=skip: q.load(letters, 256, 5000, skip), str(path))
        results["error" if isinstance(found, InputError) else "read"] += 1
        for question in found if isinstance(found, list) else ():
            assert question.answer and question.prompt
    assert min(results.values()) > 300, results


def test_corpora(tmp_path):
    """The reader of the datasets package takes its time: few whole corpora, and many files of the same lines."""
    chance, path = random.Random(5), tmp_path / "text.jsonl"
    rows = [{"text": "one two", "n": 1}, {"text": "three", "meta": {"a": [1]}}, {"text": "four", "tags": ["x"]}]
    for number in range(40):
        path.write_bytes(
            mutated_lines(rows, chance) if number % 2 else mutated_bytes(b"one\ntwo \xc3\xa9\n" * 9, chance)
        )
        source = Corpus.parse(str(path) if number % 2 else str(path.rename(tmp_path / "text.txt")))
        found = outcome(lambda source=source: list(source.documents()), "text.")
        assert isinstance(found, InputError) or all(text.encode() is not None for text in found)
    for _ in range(500):
        path.write_bytes(mutated_lines(rows, chance))
        found = outcome(lambda: list(records_of(path)), str(path))
        assert isinstance(found, InputError) or all(isinstance(row, dict) for _, row in found)


def test_results_and_logs(tmp_path):
    chance, path = random.Random(6), tmp_path / "results.jsonl"
    rows = [
        {"stage": "baseline", "point": "a", "strict_acc": 1.0},
        {"stage": "edited", "point": "b", "edit": {"rho": 0.5}},
    ]
    found_there = {"document": 1, "offset": 2, "match_length": 3, "prefix_ids": [1], "suffix_ids": [2]}
    log = [{"search": "k"}, {"batch": 0, "windows": 4, "found": [found_there]}, {"batch": 1, "windows": 4, "found": []}]
    (tmp_path / "mining").mkdir()
    for _ in range(400):
        path.write_bytes(mutated_lines(rows, chance))
        {row.get("point"): row for row in outcome(lambda: read_results(path), "")}
        (tmp_path / "mining" / "rank-0.jsonl").write_bytes(mutated_lines(log, chance))

        def go_on():
            again = MiningLog(tmp_path / "mining", "k")
            done = again.done()
            again.append(0, {"batch": 7, "windows": 1, "found": []})
            return done, MiningLog(tmp_path / "mining", "k").done()

        found = outcome(go_on, str(tmp_path / "mining"))
        assert isinstance(found, InputError) or found[1] == found[0] | {7}


# -- configs ------------------------------------------------------------------------------------------------


class _Built(Exception):
    """Carries the parser out of the command line before it does anything."""


class _ParserOnly(TrainCLI):
    def parse_arguments(self, parser, args):
        raise _Built(parser)


@pytest.fixture(scope="module")
def parsers():
    """The real parsers of both programs, built once, by their command."""
    quiet()
    try:
        _ParserOnly([])
    except _Built as built:
        return {"fit": built.args[0], "sweep": make_parser(), "apply": make_parser()}


TRAIN = {
    "seed_everything": 1,
    "trainer": {"devices": 1, "precision": "32-true", "max_epochs": 1},
    "model": {"model_name": "demo", "labels": "sampled"},
    "data": {"corpus": {"embedded": True}, "max_tokens": 1000, "memorized": "demo:planted.jsonl", "batch_size": 4},
    "collect": {"blocks": [3], "projections": ["gate"]},
    "edit": {"rho": 0.7, "formula": "modified", "blocks": "all", "alpha": {"a": 1.0}},
}
SWEEP = {
    "model": "demo",
    "factors": "runs/x/factors",
    "domains": {"sums": "runs/y"},
    "output": "out",
    "formulas": ["original", "modified"],
    "rhos": [0.5, 0.7],
}
APPLY = {"model": "demo", "factors": "runs/x/factors", "output": "out", "rho": 0.5, "blocks": [1, 2], "save": "patch"}
HOSTILE = [
    "a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefghi")),
    "model: &a [*a]",
    "edit: &a {rho: *a}",
    "model: !!python/object/apply:os.system ['touch PLACE']",
    "edit: !!python/object/new:os.system ['touch PLACE']",
    "data: !!python/name:os.system",
    *("edit: {rho: 2020-99-99}", "edit: {rho: .nan}", "edit: {rho: 1e400}", "edit: {rho: 0.5, rho: 0.6}"),
    *(
        "edit: !!float x",
        "edit: !!int ''",
        "edit: !!timestamp x",
        "edit: !!bool x",
        "edit: !!binary z",
        "edit: !!set {a}",
    ),
    *("edit: {<<: 3}", "edit: {<<: [*x]}", "edit: !x y", 'edit: "\\ud800"', "model: /dev/zero", "config: PLACE"),
    *("? [a]\n: 3", "? {a: 1}\n: 2", "%YAML 9.9\n---\na: 1", "--- a\n--- b", "\0", "a: \x07", "\ufeffedit: {rho: 0.5}"),
    *("edit: {rho: " + "9" * 6000 + "}", "edit: {rho: 0x" + "f" * 6000 + "}", "edit: {rho: 1:" + "59:" * 3000 + "1}"),
    *("[" * 30_000, "edit: " + "{a: " * 2000 + "1" + "}" * 2000, "- " * 5000),
    *("# " + "x" * 2_000_000, "x: " + "y" * 300_000),
]


@pytest.mark.parametrize(
    ("command", "base", "count"), [("fit", TRAIN, 110), ("sweep", SWEEP, 70), ("apply", APPLY, 70)]
)
def test_configs(parsers, tmp_path, monkeypatch, command, base, count):
    """Read by the real parsers; what passes is a config, what does not ends with code 2 and one message."""
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    chance, path = random.Random(7), tmp_path / "c.yaml"
    outcomes = {"error": 0, "read": 0}
    texts = [text.replace("PLACE", str(tmp_path / "ran")).encode("utf-8", "surrogatepass") for text in HOSTILE]
    for _ in range(count):
        mutated = mutated_value(base, chance)
        text = yaml.safe_dump(mutated, allow_unicode=True) if chance.random() < 0.5 else json.dumps(mutated)
        text = text.encode("utf-8", "surrogatepass")
        texts.append(mutated_bytes(text, chance) if chance.random() < 0.3 else text)
    for text in texts:
        path.write_bytes(text)
        tally(MUTATED)
        said = io.StringIO()

        def parse():
            words = [command, "--config", str(path)]
            check_config_files(words)
            return parsers[command].parse_args(words)[command]

        with redirect_stderr(said), redirect_stdout(said), within(SECONDS):
            try:
                found = parse()
            except SystemExit as error:
                assert error.code == 2 and said.getvalue().startswith("error: "), text[:200]
                outcomes["error"] += 1
                continue
            except InputError as error:
                assert str(path) in str(error)
                outcomes["error"] += 1
                continue
        outcomes["read"] += 1
        if command == "fit" and found.edit is not None:
            outcome(lambda found=found: EditConfig(**found.edit), "")
    assert outcomes["error"] > count / 3 and outcomes["read"] > count / 20, outcomes
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_deep_values_in_other_places(tmp_path, monkeypatch):
    """PyYAML's fast parser would end the interpreter at each of them."""
    monkeypatch.chdir(tmp_path)
    deep = ["{a: " * 1000, "- " * 2000, "? " * 2000]
    for text in deep:
        Path("deep.yaml").write_text(text)
        Path("named.yaml").write_text("edit: deep.yaml")
        Path("quoted.yaml").write_text(json.dumps({"edit": text}))
        for words in (["--edit=" + text], ["--edit", text], ["--edit", "deep.yaml"], ["--edit=deep.yaml"]):
            with pytest.raises(InputError, match=r"nested too deeply"):
                check_config_files(["fit", *words])
        for file in ("deep.yaml", "named.yaml", "quoted.yaml"):
            with pytest.raises(InputError, match=r"nested too deeply"):
                check_config_files(["fit", "--config", file])
    # What is long without being deep passes.
    check_config_files(
        ["fit", "--data.few_shot", "Question: 1 + 1 = 2; " * 500, "--model", "x: y " * 500, "--edit", "{" * 50]
    )


def test_files_that_stand_for_groups_of_options_are_looked_at_too(tmp_path):
    """The parser reads any file that is named for such a group, whatever its name ends in, in C."""
    deep, config = tmp_path / "deep.txt", tmp_path / "config.yaml"
    deep.write_text("[" * 100_000)
    for text in (f"collect: {deep}", f"data: {{mining: {deep}}}", "model: deep.txt"):
        config.write_text(text)
        with pytest.raises(InputError, match=r"deep\.txt: not valid YAML: nested too deeply"):
            check_config_files(["fit", "--config", str(config)])
    for words in (["--model", str(deep)], [f"--trainer={deep}"]):
        with pytest.raises(InputError, match=r"deep\.txt: not valid YAML: nested too deeply"):
            check_config_files(["fit", *words])
    check_config_files(["fit", "--data.corpus", str(deep)])  # a text is none of these
