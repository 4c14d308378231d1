"""Audits: figures against the notebook function, the page, exit status, what is refused, and going on after a stop."""

import json
import math
from pathlib import Path

import pytest
import yaml

from lightning_kfac import extraction
from lightning_kfac.cli import audited
from lightning_kfac.cli.commands import audit
from lightning_kfac.cli.edit import main
from lightning_kfac.evaluation import instruments
from lightning_kfac.evaluation.functions import memorization_score
from tests.common import edit, failed, write_jsonl


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six planted passages and six that the model has not seen; one of these would act on a page."""
    rows = [
        json.loads(line)
        for name in ("planted_report", "unseen")
        for line in Path(f"lightning_kfac/assets/demo/{name}.jsonl").read_text().splitlines()[:6]
    ]
    rows = [{"prefix": row["prefix"], "suffix": row["suffix"]} for row in rows]
    rows[0]["prefix"] = "<script>alert(1)</script>" + rows[0]["prefix"]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "mixed.jsonl", rows), rows


def audits(*flags, **options):
    main(["audit", *flags, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "one"
    edit("audit", model="demo", texts=mixed[0], output=folder)
    return folder, json.loads((folder / "audit.json").read_text())


def test_figures_are_those_of_the_functions(whole, mixed, demo_model):
    from lightning_kfac.loading import load_tokenizer

    folder, found = whole
    pair = [row["prefix"] for row in mixed[1]], [row["suffix"] for row in mixed[1]]
    score = extraction(demo_model, load_tokenizer("demo"), *pair)
    p = score.log_p.exp().tolist()
    counts = found["counts"]["model"]
    assert counts["texts@10"] == sum(1 - (1 - x) ** 10 >= 0.5 for x in p)
    assert counts["texts@1000"] == counts["passages@1000"] == sum(1 - (1 - x) ** 1000 >= 0.5 for x in p)
    assert 5 <= counts["texts@1000"] <= 7
    figures = found["figures"]["model"]
    for n in (1, 10, 1000):
        assert figures[f"expected@{n}"]["value"] == pytest.approx(score.expected_at(n), rel=1e-4)
    strict = memorization_score(demo_model, load_tokenizer("demo"), *pair).strict_accuracy
    assert figures["strict"]["value"] == strict and counts["strict"] == round(12 * strict)
    assert found["value"] == figures["texts@1000"]["value"] and not found["exceeded"] and found["changes"] == {}
    rows = [json.loads(line) for line in (folder / "passages.jsonl").read_text().splitlines()]
    expected = [None if math.isinf(x) else pytest.approx(x, abs=1e-3) for x in score.log_p.tolist()]
    assert [row["log_p"]["model"] for row in rows] == expected and [row["text"] for row in rows] == list(range(12))


def test_the_page(whole):
    folder, found = whole
    page = (folder / "audit.html").read_text()
    many = found["counts"]["model"]["texts@1000"]
    assert found["verdict"][0].startswith(f"{many} of 12 texts come out word for word in 1,000 tries; ")
    order = ["Verdict", found["verdict"][0], "What comes out", "Passages", "How it was measured", "Not measured"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("arxiv", "")
    assert all(text in page for text in ("no held-out text was given", "a chance of 50 % or more", "top-k 40"))
    for absent in ("How well it still works", "Where it comes out", "Can a membership test tell?"):
        assert absent not in page
    assert "Whether a test can tell" in page and found["leaks"] is None
    assert (folder / "manifest.jsonl").is_file() and not (folder / "state").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == "demo"


def test_a_report_of_an_audit_names_its_page(whole, capsys):
    """Rather than a page that says of all of it that it was not measured."""
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(whole[0])])
    assert stopped.value.code == 2 and not (whole[0] / "report.html").exists()
    assert "the folder of an audit, which wrote its own page, audit.html" in capsys.readouterr().err


def test_exit_status_and_json(mixed, tmp_path, capsys, whole):
    options = {"model": "demo", "texts": mixed[0]}
    with pytest.raises(SystemExit) as stopped:
        audits("--json", **options, output=tmp_path / "a", fail_above=0.2)
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exceeded"] and found["fail_above"] == 0.2 and found["figures"] == whole[1]["figures"]
    audits("--json", **options, output=tmp_path / "b", fail_above=0.6, measure="strict", chance=0.9)
    found = json.loads(capsys.readouterr().out)
    assert not found["exceeded"] and found["measure"] == "strict" and found["chance"] == 0.9
    assert (tmp_path / "a" / "config.yaml").is_file()


def test_json_holds_no_control(mixed, tmp_path, capsys):
    """Of a file's name neither: it is printed as JSON escapes it."""
    name = tmp_path / "a\x1b[2J\x7f\x9b\u202eb.jsonl"
    name.write_bytes(mixed[0].read_bytes())
    audits("--json", model="demo", texts=name, output=tmp_path / "a")
    printed = capsys.readouterr().out
    assert printed.rstrip("\n").isprintable() and json.loads(printed)["texts"]["source"] == str(name)


def test_an_edited_model_is_compared_with_its_source(mixed, demo_factors, tmp_path, capsys):
    edit("apply", factors=demo_factors, rho=0.3, output=tmp_path / "edited")
    edit("audit", model=tmp_path / "edited", texts=mixed[0], output=tmp_path / "audit", near_verbatim=2, beams=2)
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["before"] == "demo" and list(found["figures"]) == ["before", "after"]
    for name, change in found["changes"].items():
        before, after = (found["figures"][stage][name]["value"] for stage in ("before", "after"))
        assert change["value"] == pytest.approx(after - before, abs=1e-9)
        assert change["low"] is None or change["low"] <= change["value"] <= change["high"]
    assert (
        found["figures"]["after"]["near_verbatim@1000"]["value"] >= found["figures"]["after"]["expected@1000"]["value"]
    )
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "Before the edit: " in page and "an edit of demo" in page and "within 2 token edits" in page
    said = capsys.readouterr().out
    assert "change" in said and max(map(len, found["verdict"][0].split())) < 80


def test_long_texts_are_cut_and_drawn(mixed, tmp_path):
    rows = mixed[1]
    texts = [rows[1]["prefix"] + rows[1]["suffix"] + rows[7]["prefix"] + rows[7]["suffix"], rows[8]["prefix"], "short"]
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    edit("audit", model="demo", texts=file, output=tmp_path / "audit", heldout=file, heldout_tokens=200)
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["texts"] | {"n_texts": 2, "halved": 1, "left_out": 1} == found["texts"]
    assert found["texts"]["n_passages"] > 2 and found["counts"]["model"]["texts@1000"] == 1
    assert found["verdict"][0].startswith("Something of 1 of 2 texts comes out word for word in 1,000 tries: 1 of ")
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "Where it comes out" in page and "How well it still works" in page and "1 text too short" in page


def test_a_single_text_has_no_interval(mixed, tmp_path, capsys):
    """However many passages it is cut into: neither its own figures, nor those of the membership tests."""
    rows = mixed[1]
    long = {"text": " ".join(row["prefix"] + row["suffix"] for row in rows)}
    seen, other = (write_jsonl(tmp_path / f"{name}.jsonl", [long]) for name in ("seen", "other"))
    edit("audit", model="demo", texts=seen, nonmembers=other, output=tmp_path / "audit")
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["texts"]["n_texts"] == 1 and found["leaks"]["members"] == found["texts"]["n_passages"] > 8
    figures = found["figures"]["model"]
    assert {figures[name]["low"] for name in ("passages@1000", "strict", "expected@10")} == {None}
    assert [test["auc"]["model"]["low"] for test in found["leaks"]["tests"].values()] == [None] * 6
    said = capsys.readouterr().out
    assert said.count("[n/a]") >= 6 and "[0.000, 0.000]" not in said
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "several are of one text" in page and page.count("0.500 [n/a]") >= 6
    assert f"tells these passages from {found['leaks']['nonmembers']} others with an AUC of 0.500 [n/a];" in page


def test_what_cannot_be_audited_is_said_before_the_model_is_read(mixed, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audited, "open_model", lambda *_: pytest.fail("the model was read"))
    short = write_jsonl(tmp_path / "s.jsonl", [{"text": "short"}])
    empty = write_jsonl(tmp_path / "e.jsonl", [{"prefix": "Return", "suffix": ""}])
    one = write_jsonl(tmp_path / "o.jsonl", [{"text": "Return the value for key if key is in the dictionary. " * 4}])
    long = write_jsonl(tmp_path / "l.jsonl", [{"text": "Return the value for key if key is in the dictionary. " * 200}])
    nothing = write_jsonl(tmp_path / "n.jsonl", [])
    good = {"model": "demo", "texts": mixed[0], "output": tmp_path / "run"}
    for changes, said in (
        ({"temperature": 0}, "--temperature is 0"),
        ({"top_k": 0}, "--top_k is 0"),
        ({"top_p": 1.5}, "--top_p is 1.5"),
        ({"chance": 1}, "--chance is 1"),
        ({"chance": 0}, "--chance is 0"),
        ({"near_verbatim": -1}, "--near_verbatim is -1"),
        ({"fail_above": 2}, "--fail_above is 2"),
        ({"measure": "near_verbatim@1000"}, "measured only where near_verbatim is set"),
        ({"measure": "luck"}, "luck"),
        ({"suffix_len": 0}, "--suffix_len is 0"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"texts": short}, "no text is long enough"),
        ({"texts": empty}, "the suffix is empty"),
        ({"texts": tmp_path / "none.jsonl"}, "no such file"),
        ({"prefix_len": 60, "suffix_len": 60}, "the suffix has 48 tokens"),
        ({"heldout": tmp_path / "none.txt"}, "no such file"),
        ({"texts": nothing}, "has no text"),
        ({"nonmembers": tmp_path / "none.jsonl"}, "no such file"),
        ({"texts": one, "prior_ratio": "true"}, "one passage, and --prior-ratio needs the prefix of another"),
        ({"texts": long, "prefix_len": 3000}, "but the model takes at most 1024 positions; lower --prefix-len"),
        ({"output": whole[0]}, "already holds a finished run; add --overwrite"),
    ):
        assert said in failed(capsys, "audit", **(good | changes)), changes
    inside = {"output": whole[0], "texts": whole[0] / "passages.jsonl"}
    assert "passages.jsonl" in failed(capsys, "audit", "--overwrite", **(good | inside))
    assert "--texts is missing" in failed(capsys, "audit", model="demo")
    assert "--model is missing" in failed(capsys, "audit", texts=mixed[0])
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "audit.html").write_text("my own")
    assert "audit.html" in failed(capsys, "audit", **(good | {"output": foreign}))
    assert (foreign / "audit.html").read_text() == "my own"
    assert not (tmp_path / "run" / "audit.html").exists()


@pytest.mark.parametrize("accelerator", ["tpu", "xpus"])
def test_an_accelerator_that_is_not_here_is_one_line(mixed, tmp_path, capsys, monkeypatch, accelerator):
    monkeypatch.setattr(audited, "open_model", lambda *_: pytest.fail("the model was read"))
    options = {"model": "demo", "texts": mixed[0], "output": tmp_path / "audit"}
    assert failed(capsys, "audit", **options, accelerator=accelerator).startswith(f"error: accelerator {accelerator}: ")


def test_an_interrupted_audit_goes_on(mixed, tmp_path, capsys, monkeypatch):
    options = {"model": "demo", "texts": mixed[0], "output": tmp_path / "run"}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(audited, "described", stop)
        edit("audit", **options)
    assert stopped.value.code == 130 and not (tmp_path / "run" / "audit.html").exists()
    with monkeypatch.context() as patched:
        patched.setattr(instruments.Recitation, "add", lambda *_: pytest.fail("measured again"))
        edit("audit", **options)
    assert (tmp_path / "run" / "audit.html").is_file()
    audits("--overwrite", **options, top_k=3)
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["sampling"]["top_k"] == 3


def test_the_embedded_default(tmp_path, monkeypatch):
    """Cut small; the shipped config says the same."""
    written = yaml.safe_load(Path("configs/audit.yaml").read_text())
    assert {name: written[name] for name in audit.EMBEDDED} == audit.EMBEDDED
    edit("audit", output=tmp_path / "run", heldout_tokens=600, documents_tokens=1500)
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["verdict"][0].startswith("100 of 100 texts come out word for word in 1,000 tries; 98 of them in 10.")
    assert "Where it comes out" in (tmp_path / "run" / "audit.html").read_text()
    assert found["figures"]["model"]["perplexity"]["value"] > 20
    assert (found["leaks"]["members"], found["leaks"]["nonmembers"]) == (100, 100)
    assert found["leaks"]["tests"]["loss"]["auc"]["model"]["value"] > 0.99
    page = (tmp_path / "run" / "audit.html").read_text()
    assert "Can a membership test tell?" in page and "Whether a test can tell" not in page
