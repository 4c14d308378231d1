"""The notebook's functions and the command line measure the same files alike, to the last digit."""

import json
import math
import statistics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_kfac import exact_accuracy, extraction, memorization_score, ndcg, perplexity
from lightning_kfac.assets import DEMO, DEMO_ARITHMETIC
from lightning_kfac.cli.train import main as train
from lightning_kfac.loading import load_model, load_tokenizer
from tests.common import build_model, results, write_jsonl

SEQ_LEN = 48
DOCUMENTS = [
    f"Line {n}: the harbour office opens at {n}.\n" + "It closes when the last boat is in. " * n for n in range(9)
]
PAIRS = [(f"Clause {n}: the tenant shall", f" return the keys by noon on day {n}.") for n in range(7)]
QUESTIONS = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(5)]


def byte_tokenizer(start: bool, end: bool) -> PreTrainedTokenizerFast:
    """One token a byte: <eos> 0, <bos> 1, <pad> 2; optionally put around every text."""
    vocab = {"<eos>": 0, "<bos>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = ("<bos> " if start else "") + "$A" + (" <eos>" if end else "")
    around = [("<bos>", 1), ("<eos>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


def model_folder(folder, start: bool, end: bool):
    """A small model of bytes, and another one with the same tokenizer for nDCG."""
    tokenizer = byte_tokenizer(start, end)
    model = build_model("llama", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=0)
    noise = torch.Generator().manual_seed(1)
    for name in ("before", "after"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return str(folder / "before"), str(folder / "after")


@pytest.mark.parametrize(("start", "end"), [(False, False), (True, False), (True, True)])
def test_figures_of_a_small_model(tmp_path, start, end):
    before, after = model_folder(tmp_path, start, end)
    files = {
        "heldout": write_jsonl(tmp_path / "heldout.jsonl", [{"text": text} for text in DOCUMENTS]),
        "memorized": write_jsonl(tmp_path / "set.jsonl", [{"prefix": p, "suffix": s} for p, s in PAIRS]),
        "questions.sums": write_jsonl(tmp_path / "sums.jsonl", QUESTIONS),
    }
    compare(tmp_path, before, after, files)


def test_figures_of_the_demo(tmp_path):
    """Where something is recited."""
    model = load_model("demo-arithmetic", "float32")
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight")[::4] = 0
    model.save_pretrained(tmp_path / "after")
    load_tokenizer("demo-arithmetic").save_pretrained(tmp_path / "after")
    rows = [(DEMO / name).read_text("utf-8").splitlines()[:8] for name in ("planted_report.jsonl", "unseen.jsonl")]
    texts = [{key: json.loads(row)[key] for key in ("prefix", "suffix")} for row in rows[0] + rows[1]]
    sums = (DEMO_ARITHMETIC / "facts_other.jsonl").read_text().splitlines()[:5]
    files = {
        "heldout": write_jsonl(tmp_path / "heldout.jsonl", [{"text": text} for text in DOCUMENTS]),
        "memorized": write_jsonl(tmp_path / "set.jsonl", texts),
        "questions.sums": write_jsonl(tmp_path / "sums.jsonl", sums),
    }
    row = compare(tmp_path, "demo-arithmetic", str(tmp_path / "after"), files)
    assert 0 < row["strict_acc"] < 1 and row["sums/exact_acc"] > 0


def compare(folder, before, after, files):
    """The row of results of the edited model, whose figures the functions give again."""
    options = {
        "model.model_name": after,
        "model.reference": before,
        "model.dtype": "float32",
        "data.seq_len": SEQ_LEN,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.default_root_dir": folder / "run",
    } | {f"data.{name}": path for name, path in files.items()}
    train(["validate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    _, row = results(folder / "run")
    model, baseline, tokenizer = load_model(after, "float32"), load_model(before, "float32"), load_tokenizer(after)
    assert row["perplexity"] == perplexity(model, tokenizer, DOCUMENTS, seq_len=SEQ_LEN)
    assert row["ndcg@10"] == ndcg(model, baseline, tokenizer, DOCUMENTS, seq_len=SEQ_LEN) < 1
    pairs = [json.loads(line) for line in files["memorized"].read_text("utf-8").splitlines()]
    score = memorization_score(model, tokenizer, [p["prefix"] for p in pairs], [p["suffix"] for p in pairs])
    assert row["strict_acc"] == score.strict_accuracy
    assert row["loose_acc"] == score.loose_accuracy
    assert row["avg_levenshtein_norm"] == score.avg_levenshtein_norm
    assert row["intervals"]["avg_levenshtein_norm"] == list(score.intervals["avg_levenshtein_norm"])
    drawn = extraction(model, tokenizer, [p["prefix"] for p in pairs], [p["suffix"] for p in pairs])
    assert row["extraction"]["expected_at"] == {str(n): drawn.expected_at(n) for n in (1, 10, 1000)}
    assert row["extraction"]["share_p"] == {p: drawn.share(float(p)) for p in ("0.001", "0.01", "0.1", "0.5")}
    median = statistics.median(drawn.log_p.tolist()) / math.log(10)
    found = row["extraction"]["median_log10_p"]
    assert found is None if math.isinf(median) else found == pytest.approx(median, rel=1e-15)
    assert row["sums/exact_acc"] == exact_accuracy(model, tokenizer, str(files["questions.sums"]))
    return row
