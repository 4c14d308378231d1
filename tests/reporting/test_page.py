"""The report of every kind of run, and wrong folders."""

import json

import pytest

from lightning_kfac.cli.edit import main as edit
from lightning_kfac.reporting.page import Html, bullets, section, table
from lightning_kfac.storage.results import append_result

RATES = {"strict_acc": 0.98, "loose_acc": 1.0, "avg_levenshtein_norm": 0.01, "n_sequences": 50, "perplexity": 20.0}
EDIT = {"formula": "original", "rho": 0.8, "mode": "suppress", "alpha": None, "blocks": [3], "projections": ["up"]}
EDIT |= {"fraction_kept": 0.2, "mass_kept": 0.8, "relative_change": 0.5, "layers": None, "seed": None}


def report(folder):
    edit(["report", str(folder)])
    return (folder / "report.html").read_text("utf-8")


def test_texts_are_escaped():
    assert "<script>" not in section("<script>", bullets(["<script>"]), table(["<script>"], [["<script>"]]))
    assert "<b>x</b>" in table(["a"], [[Html("<b>x</b>")]])
    assert section("nothing", "") == ""


def test_report_of_a_comparison(tmp_path):
    after = {**RATES, "strict_acc": 0.02, "intervals": {"strict_acc": [0.01, 0.1]}, "ndcg@10": 0.93}
    after["differences"] = {"strict_acc": [-0.96, -1.0, -0.9]}
    append_result(tmp_path / "results.jsonl", {"stage": "baseline", **RATES, "model": "demo <1>"})
    append_result(tmp_path / "results.jsonl", {"stage": "edited", **after, "edit": EDIT})
    example = {"prefix": "p<", "gold": "one two", "before": "one two", "after": "one three", "diverging": "three"}
    (tmp_path / "comparison.json").write_text(json.dumps({"examples": [example], "loss_change": None, "edges": []}))
    text = report(tmp_path)
    assert "demo &lt;1&gt;" in text and "p&lt;" in text
    assert "one <mark>three</mark>" in text
    assert '0.020 <span class="interval">[0.010, 0.100]</span>' in text
    assert '-0.960 <span class="interval">[-1.000, -0.900]</span>' in text
    assert "(sampling, fine-tuning, paraphrase): not measured" in text and "Extraction by sampling" not in text
    assert "Position stress: other prompts" in text and "nDCG@10: no unedited" not in text


def test_report_of_extraction(tmp_path):
    """Before and after with the curve; few of the figures are in the table of all metrics."""
    names = ("extraction.expected_at.10", "extraction.share_p.0.01", "quotes/extraction.expected_at.10")
    scheme = {"extraction.temperature": 1.0, "extraction.top_k": None, "extraction.top_p": 0.9}
    for stage, value in (("baseline", 0.75), ("edited", 0.125)):
        row = RATES | scheme | dict.fromkeys(names, value) | {"extraction.median_log10_p": None}
        row["intervals"] = {names[0]: [value - 0.1, value + 0.1]}
        row["differences"] = {names[0]: [-0.625, -0.7, -0.5]} if stage == "edited" else {}
        append_result(tmp_path / "results.jsonl", {"stage": stage, **row})
    curves = {name: {"baseline": [0.5, 0.75], "edited": [0.0, 0.125]} for name in ("memorized", "quotes")}
    (tmp_path / "extraction.json").write_text(json.dumps({"tries": [1, 10], "curves": curves}))
    text = report(tmp_path)
    table, own = text.split("Extraction by sampling")
    for part in (table, own):
        assert '0.125 <span class="interval">[0.025, 0.225]</span>' in part
        assert '-0.625 <span class="interval">[-0.700, -0.500]</span>' in part
        assert "quotes: extracted in 10 samples" in part
    assert "probability 1 % or more" in own and "probability 1 % or more" not in table
    assert (
        "median of log10 p</td><td>n/a" in own
        and "temperature 1.0, all tokens, top-p 0.9" in text
        and "None" not in text
    )
    assert "expected share over the number of samples" in table
    assert "(other prompts, fine-tuning, paraphrase): not measured" in own


def test_report_of_members(tmp_path):
    for stage, value in (("baseline", 0.875), ("edited", 0.625)):
        row = {"leaks.members": 30, "leaks.nonmembers": 40, "leaks.k": 0.2, "leaks.loss.auc": value}
        row |= {"leaks.loss.tpr_at_fpr_0.01": value - 0.5, "intervals": {"leaks.loss.auc": [value - 0.1, value + 0.1]}}
        row["differences"] = {"leaks.loss.auc": [-0.25, -0.4, -0.1]} if stage == "edited" else {}
        row["leaks.bulk_share.layers"] = {"model.layers.3.mlp.up_proj": value}
        row["leaks.bulk_share_random.layers"] = {"model.layers.3.mlp.up_proj": 0.5}
        append_result(tmp_path / "results.jsonl", {"stage": stage, **row})
    table, own = report(tmp_path).split("Members against non-members")
    assert "AUC of members" not in table and "30 members, 40 non-members; Min-K of the least likely 20%" in own
    assert '0.625 <span class="interval">[0.525, 0.725]</span>' in own and "0.125</td>" in own
    assert '-0.250 <span class="interval">[-0.400, -0.100]</span>' in own
    assert "loss: AUC of members" in own and "loss: members found at 1% false alarms" in own
    cells = "</td><td>".join(["0.875", "0.500", "0.625", "0.500"])
    assert cells in own and "edited, random" in own
    assert "Membership: no members" not in own and "Recitation: no memorized set" in own


def test_report_of_a_sweep(tmp_path):
    append_result(tmp_path / "results.jsonl", {"stage": "baseline", "point": "a", "edit": None, **RATES})
    for number in range(3):
        row = {
            **RATES,
            "strict_acc": 0.1 * number,
            "perplexity": 21.0 + number,
            "edit": {**EDIT, "rho": 0.7 + number / 10},
        }
        append_result(tmp_path / "results.jsonl", {"stage": "edited", "point": f"b{number}", **row})
    text = report(tmp_path)
    assert "Pareto figure" in text and text.count("<tr>") == 5


def test_report_of_a_sweep_measured_on_two_texts(tmp_path):
    """The rows of the latest text only."""
    for context in ("x", "y"):
        rows = [("baseline", None, 0.98), ("edited", EDIT, 0.1)]
        for stage, edit_row, strict in rows:
            row = {**RATES, "strict_acc": strict, "edit": edit_row, "context": context}
            append_result(tmp_path / "results.jsonl", {"stage": stage, "point": f"{stage}{context}", **row})
    assert report(tmp_path).count("<tr>") == 3


def test_report_of_a_study_of_attention(tmp_path):
    change = {"value": 0.08, "low": 0.07, "high": 0.09}
    costs = {"top1": {"perplexity": 73.7, "change": change}, "lowrank 4": {"perplexity": 70.6, "change": change}}
    head = {"layer": 4, "head": 1, "effective_dimension": 18, "entropy": 1.234, "top1_mass": 0.5}
    share = {"value": 0.56, "low": 0.5, "high": 0.6}
    study = {"verdict": "It costs.", "costs": costs, "recovered": {"4": share}, "heads": [head]}
    (tmp_path / "crystallization.json").write_text(json.dumps(study))
    text = report(tmp_path)
    assert "It costs." in text and "layer 4 head 1" in text and "+8.00%" in text and "56%" in text


def test_report_of_a_search(tmp_path):
    """With the texts that were found, in words for the keys of the file, and without what is not known."""
    about = {"windows": 1234, "kept": 2, "recited": 1, "before": None, "bulk_share": None, "version": "0.1.0"}
    (tmp_path / "mining.json").write_text(json.dumps(about))
    row = {"document": 3, "offset": 5, "prefix": "given <b>", "suffix": "recited <script>"}
    (tmp_path / "memorized.jsonl").write_text(json.dumps(row) + "\n")
    text = report(tmp_path)
    assert "Of 1,234 windows that were looked at, 1 is recited word for word." in text
    assert "given &lt;b&gt;<mark>recited &lt;script&gt;</mark>" in text and "document 3, from its token 5" in text
    assert "lightning_kfac 0.1.0" in text and "None" not in text and "bulk_share" not in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such run folder"),
        (lambda path: path.mkdir(), "holds no results.jsonl and no run.json"),
        (lambda path: (path.mkdir(), (path / "mining.json").write_text("{")), "mining.json: damaged or incomplete"),
    ],
)
def test_wrong_folders(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    with pytest.raises(SystemExit):
        edit(["report", str(tmp_path / "run")])
    assert message in " ".join(capsys.readouterr().err.split())
