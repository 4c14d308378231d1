"""One door: however a file or a text reaches the parser, it is looked at first."""

import http.server
import os
import threading
from itertools import pairwise

import pytest

from lightning_kfac.cli.edit import make_parser
from lightning_kfac.cli.parsers import InputErrors, input_error_behind
from lightning_kfac.cli.quiet import quiet
from lightning_kfac.cli.train import TrainCLI
from lightning_kfac.errors import InputError
from lightning_kfac.storage.yaml_files import check_config_files
from tests.storage.test_fuzz import within

# Ten lines of ten aliases: more than any memory once they are written out, and lists deeper than any stack.
BOMB = "a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in pairwise("abcdefghij"))
DEEP = "[" * 30_000
FIT = ("PL_CONFIG", "PL_FIT__CONFIG", "PL_FIT__DATA", "PL_FIT__TRAINER", "PL_FIT__TRAINER__CALLBACKS")


class _Built(Exception):
    """Carries the parser out of the command line before it does anything."""


class _ParserOnly(TrainCLI):
    def parse_arguments(self, parser, args):
        raise _Built(parser)


def parser_of_fit():
    quiet()
    try:
        _ParserOnly([])
    except _Built as built:
        return built.args[0]


@pytest.fixture(scope="module")
def fit():
    return parser_of_fit()


@pytest.fixture
def said(capsys):
    """What a parser, with nothing before it, says of words that it refuses."""

    def refused(parser, words):
        with within(20), pytest.raises((SystemExit, InputError)) as stopped:
            parser.parse_args(words)
        if isinstance(stopped.value, InputError):
            return str(stopped.value)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refused


def ways(file):
    """Every spelling in which a command line or a config names a file for the parser."""
    return [
        *(["fit", "--config", file], ["fit", f"--config={file}"], ["fit", "-c", file], ["fit", f"-c{file}"]),
        *(["fit", f"--conf={file}"], ["--config", file, "fit"], ["fit", f"--data={file}"], ["fit", "--data", file]),
        *(["fit", f"--trainer={file}"], ["fit", f"--trainer.callbacks={file}"]),
        *(["fit", f"--trainer.callbacks+={file}"], ["fit", f"--trainer.logger={file}"], ["fit", f"--collect={file}"]),
        *(["fit", f"--model.training={file}"], ["fit", f"--data.mining={file}"]),
        *(["fit", f"--data=file://{os.path.abspath(file)}"], ["fit", f"--config=file://{os.path.abspath(file)}"]),
    ]


@pytest.mark.parametrize("number", range(len(ways(""))))
def test_every_way_passes_it(fit, said, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large").write_text("# " + "x" * (1 << 20) + "\n{}")
    (tmp_path / "bomb").write_text(BOMB)
    (tmp_path / "deep").write_text(DEEP)
    (tmp_path / "latin").write_bytes(b"a: \xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    expected = {
        "large": "too large for a config file",
        "bomb": "too large once its aliases are written out",
        "deep": "nested too deeply",
        "latin": "not valid YAML",
        "pipe": "a pipe, not a file",
    }
    for file, why in expected.items():
        assert why in said(fit, ways(file)[number]), file
    said(fit, ways("device")[number])  # the parser itself calls it no file


@pytest.mark.parametrize("inside", ["data: FILE", "{trainer: {callbacks: FILE}}", "{trainer: {callbacks: [FILE]}}",
                                    "{trainer: FILE}", "{data: {mining: FILE}}"])  # fmt: skip
def test_files_that_files_name_pass_it(fit, said, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bomb").write_text(BOMB)
    (tmp_path / "sub" / "c").write_text(inside.replace("FILE", "bomb"))
    assert "too large once its aliases are written out" in said(fit, ["fit", "--config", "sub/c"])


@pytest.mark.parametrize("name", FIT)
def test_the_environment_passes_it(said, tmp_path, monkeypatch, name):
    """``JSONARGPARSE_DEFAULT_ENV`` lets any parser read its options from there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb").write_text(BOMB)
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv(name, "bomb")
    assert "too large once its aliases are written out" in said(parser_of_fit(), ["fit"])
    if "CONFIG" not in name:
        monkeypatch.setenv(name, BOMB)
        assert "too large once its aliases are written out" in said(parser_of_fit(), ["fit"])


def test_the_other_commands_have_the_same_door(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb").write_text(BOMB)
    (tmp_path / "c.yaml").write_text("data: bomb")
    for words in (["--config=bomb"], ["--data=bomb"], ["--config", "c.yaml"], ["--domains", BOMB]):
        assert "too large once its aliases are written out" in said(make_parser(["sweep"]), ["sweep", *words])


def test_nothing_is_fetched(fit, said, tmp_path, monkeypatch):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{max_tokens: 300}")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "local.yaml").write_text("max_tokens: 300")
    names = [f"http://127.0.0.1:{server.server_port}/d.yaml", f"local://{tmp_path}/local.yaml", "memory://x.yaml"]
    names += ["hf://datasets/me/x/c.yaml", "s3://bucket/c.yaml", f"simplecache::local://{tmp_path}/local.yaml"]
    try:
        for name in names:
            (tmp_path / "c.yaml").write_text(f"data: '{name}'")
            for words in (["--config", name], [f"--data={name}"], ["--config=c.yaml"], [f"--trainer.callbacks={name}"]):
                said(fit, ["fit", *words])
                if "::" not in name and "callbacks" not in words[0]:
                    with pytest.raises(InputError, match=r"an address, not a file: fetch it, look at it"):
                        check_config_files(["fit", *words])
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


def test_the_standard_input_is_no_config(fit, said):
    assert "not from the standard input" in said(fit, ["fit", "--config=-"])


def test_files_that_name_each_other_end(fit, said, tmp_path, monkeypatch):
    """Ten small files of ten names each would be read for days."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        (tmp_path / f"f{number}").write_text(f"[{', '.join([f'f{number + 1}'] * 10)}]")
    (tmp_path / "f10").write_text("class_path: EarlyStopping")
    said(fit, ["fit", "--trainer.callbacks=f0"])
    (tmp_path / "a.yaml").write_text("{trainer: {callbacks: a.yaml}, data: {mining: b.yaml}}")
    (tmp_path / "b.yaml").write_text("[b.yaml, b.yaml]")
    with pytest.raises(InputError, match=r"names more than 100 files, or one that names itself"):
        check_config_files(["fit", "--config=a.yaml"])


def test_the_door_is_only_there_while_a_parser_reads(tmp_path):
    """Other programs in the process keep their way to read."""
    from jsonargparse import ArgumentParser, Path, get_loader

    before = Path.read_text, get_loader("yaml")
    parser = InputErrors()
    parser.add_argument("--a", type=int)
    assert parser.parse_args(["--a=3"]).a == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--a=x"])
    assert (Path.read_text, get_loader("yaml")) == before
    assert isinstance(parser, ArgumentParser) and input_error_behind(None) is None


def test_a_run_writes_into_a_local_folder():
    with pytest.raises((SystemExit, InputError)) as stopped:
        TrainCLI(["fit", "--model.model_name=demo", "--trainer.default_root_dir=memory://x"])
    assert "an address; a run writes into a local folder" in str(stopped.value)
