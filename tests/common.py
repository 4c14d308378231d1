"""What several test files share: small runs, batches, comparisons."""

import json
import random
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac.cli.edit import main
from lightning_kfac.models.loading import load_tokenizer

VOCAB = 61
ARCHITECTURES = {
    "olmo2": {
        "model_type": "olmo2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "llama": {  # grouped-query attention
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3": {  # a head width of its own
        "model_type": "qwen3",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 64, "n_inner": 40},
}
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
# float32 arithmetic of a three-block model; the issue asks for 1e-5.
TOLERANCE = 5e-6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def descending(n, seed):
    """Eigenvalues [n] in float64."""
    return torch.rand(n, generator=generator(seed), dtype=torch.float64).sort(descending=True).values


def results(folder):
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def scalars(folder):
    events = EventAccumulator(str(Path(folder) / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return events, {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def small(folder, few, **changes):
    """Options that cut a run on the demo model down to seconds; the figures of a logger would be half of these."""
    options = {
        "model.model_name": "demo",
        "model.dtype": "float32",
        "data.max_tokens": 600,
        "data.seq_len": 64,
        "data.heldout": "embedded",
        "data.heldout_tokens": 400,
        "data.memorized": few,
        "collect.blocks": "[3]",
        "collect.projections": "[up]",
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
    } | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def padded(rows, side="right", pad=0):
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


def batched(rows, size, side="right"):
    return [padded(rows[i : i + size], side) for i in range(0, len(rows), size)]


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(found, expected, tolerance=TOLERANCE):
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].n_tokens == expected[name].n_tokens
        assert relative_error(found[name].A, expected[name].A) < tolerance, name
        assert relative_error(found[name].G, expected[name].G) < tolerance, name


def projections_of(model):
    return ("up", "down") if model.config.model_type == "gpt2" else ("gate", "up", "down")


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def edit(command, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    main([command, *words])


def failed(capsys, command, *flags, **options):
    """The error message of a command that must end with code 2."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as stopped:
        main([command, *flags, *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    return error


def generated(model, prefix, length, end_of_text=()):
    """One sequence, one at a time, by ``generate``."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prefix]),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=list(end_of_text) or None,
            pad_token_id=0,
        )
    return out[0, len(prefix) :].tolist()


def sequences(model, count=17, seed=0):
    """Ragged prefixes; golds that are recited, diverge at the first token, in the middle or at the last."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 12))] for _ in range(count)]
    golds = []
    for number, prefix in enumerate(prefixes):
        gold = generated(model, prefix, rng.randrange(1, 20))
        if number % 4:
            place = (0, len(gold) - 1, rng.randrange(len(gold)))[number % 4 - 1]
            gold[place] = rng.randrange(VOCAB)
        golds.append(gold)
    return prefixes, golds


def build_model(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A small model with weights large enough that its predictions are not uniform."""
    settings = ARCHITECTURES[family] | COMMON | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    torch.set_rng_state(generator_state)
    return model.to(dtype)


def tiny_hub(folder, monkeypatch):
    """A hub cache with two revisions of me/tiny; gives the model of each."""
    models = {}
    for number, revision in enumerate(("main", "step3000")):
        commit = "ab"[number] * 40
        model = build_model("llama", vocab_size=2048)
        model.lm_head.weight.data += number
        repository = Path(folder) / "hub" / "models--me--tiny"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
        load_tokenizer("demo").save_pretrained(repository / "snapshots" / commit)
        models[revision] = model
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(Path(folder) / "hub"))
    return models
