"""Model cards: what the hub reads of them, what they say was measured, and that they carry a licence over."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lightning_kfac import EditConfig, KFACEditor, collect_factors
from lightning_kfac.editing.edited_model import save_edited
from lightning_kfac.editing.model_card import model_card, write_card
from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import VOCAB, build_model

SUMMARY = {"formula": "original", "rho": 0.8, "blocks": [3, 4], "projections": ["gate", "up"], "mode": "suppress"}
DETAILS = {
    "model": "allenai/OLMo-2-0425-1B", "revision": "main", "summary": SUMMARY | {"fraction_kept": 0.185},
    "layers": [{"name": "a"}, {"name": "b"}], "factors": {"n_tokens": 100_000, "corpus": "a text", "labels": "sampled"},
    "version": "0.1.0",
}  # fmt: skip
BEFORE = {"strict_acc": 1.0, "n_sequences": 100, "perplexity": 70.33, "intervals": {"strict_acc": [0.963, 1.0]}}
AFTER = {
    "strict_acc": 0.03, "n_sequences": 100, "perplexity": 74.78, "quotes/strict_acc": 0.5, "quotes/n_sequences": 1,
    "intervals": {"strict_acc": [0.01, 0.085]}, "differences": {"strict_acc": [-0.97, -1.0, -0.93]},
}  # fmt: skip


def front_matter(text):
    return ModelCard(text).data.to_dict()


def test_what_the_hub_reads():
    about = front_matter(model_card(DETAILS))
    assert about["base_model"] == "allenai/OLMo-2-0425-1B" and about["library_name"] == "transformers"
    assert about["pipeline_tag"] == "text-generation" and {"memorization", "lightning-kfac"} <= set(about["tags"])
    assert "license" not in about
    patch = front_matter(model_card(DETAILS | {"patch": {}}))
    assert patch["library_name"] == "lightning-kfac" and patch["base_model"] == about["base_model"]
    assert front_matter(model_card({**DETAILS, "model": "gpt2"}))["base_model"] == "gpt2"
    assert "base_model" not in front_matter(model_card({**DETAILS, "model": None}))


def test_licence_and_base_of_a_local_copy_are_carried_over(tmp_path):
    """And nothing else of its card; its path is not told."""
    folder = tmp_path / "copy"
    folder.mkdir()
    about = {"license": "other", "license_name": "ours", "license_link": "LICENSE", "base_model": "a/b", "tags": ["x"]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n# Its own\n")
    text = model_card({**DETAILS, "model": str(folder), "revision": None})
    found = front_matter(text)
    assert {key: found.get(key) for key in about} == about | {"tags": found["tags"]} and "x" not in found["tags"]
    assert "# An edit of copy\n" in text and str(tmp_path) not in text and "Its own" not in text
    (folder / "README.md").write_text("---\n[no: yaml\n---\n")
    assert "license" not in front_matter(model_card({**DETAILS, "model": str(folder), "revision": None}))


def test_settings_and_figures():
    text = model_card(DETAILS, BEFORE, AFTER)
    assert "| formula | original |" in text and "| blocks | 3, 4 |" in text and "| components kept | 18.5 % |" in text
    assert "100,000 tokens of a text, sampled labels" in text and "| layers changed | 2 |" in text
    assert "| strict accuracy | 1.000 [0.963, 1.000] | 0.030 [0.010, 0.085] | -0.970 [-1.000, -0.930] |" in text
    assert "| quotes: strict accuracy |  | 0.500 |  |" in text and "quotes: 1 sequence." in text
    assert "no proof of deletion" in text and "@article{merullo2025" in text and "None" not in text
    assert "Nothing yet." in model_card(DETAILS) and "Nothing yet." not in text


@pytest.mark.parametrize("name", ["a | b", "x`y", "<script>", "$x$", "two\nlines"])
def test_no_name_is_markdown(name):
    details = DETAILS | {"model": name, "revision": None, "factors": {"n_tokens": 1, "corpus": name}}
    text = model_card(details)
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    assert "<script>" not in heading.replace("\\<script\\>", "") and "1 token of" in text
    row = next(line for line in text.splitlines() if "curvature of" in line)
    assert row.replace("\\|", "").count("|") == 3


@pytest.mark.parametrize("save", ["full", "patch"])
def test_every_edit_has_one(tmp_path, save):
    """Also where nothing is known of the model; what is measured later is written into it."""
    import torch

    model = build_model("llama")
    ids = torch.arange(1, 65).view(2, 32) % VOCAB
    factors = collect_factors(model, [{"input_ids": ids}], blocks=[0], projections=["up"])
    editor = KFACEditor(model, factors, EditConfig(rho=0.5))
    before = weights_fingerprint(model, editor.layers)
    report = editor.apply()
    folder = tmp_path / "out"
    save_edited(model, None, folder, report, source=None, fingerprint=before, save=save)
    text = (folder / "README.md").read_text()
    assert "Nothing yet." in text and ("patch" in text.split("\n# ")[1]) == (save == "patch")
    write_card(folder, BEFORE, AFTER)
    again = (folder / "README.md").read_text()
    assert "| strict accuracy | 1.000" in again and front_matter(again) == front_matter(text)
    assert json.loads((folder / "edit.json").read_text())["summary"]["rho"] == 0.5
