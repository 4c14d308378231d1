"""An edited checkpoint in EleutherAI's lm-evaluation-harness: it loads there, and scores what plain torch says."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_kfac import EditConfig, KFACEditor, load_factors
from lightning_kfac.editing.edited_model import save_edited
from lightning_kfac.models.loading import load_tokenizer
from tests.common import edit, failed

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lightning-kfac[harness]'"
)

# Prompts and continuations of different lengths: the harness pads them into one batch.
QUESTIONS = [
    ("Return the", [" number of items in the list.", " file."]),
    ("If the optional argument is not given, the default", [" value is used.", " of the"]),
    ("Copyright (C) 2000", [" list", " Python Software Foundation; All Rights Reserved"]),
    ("This module provides", [" an interface to the", " copyright not given"]),
    ("Raises", [" ValueError", " a if the"]),
    ("The string must be a", [" string.", " license agreement of the module"]),
]
N_NEW = 12


class Reference:
    """The same model in plain torch: one text at a time, without padding and without a cache."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def log_likelihood(self, prompt: str, continuation: str) -> float:
        ids, start = torch.tensor(self.ids(prompt + continuation)), len(self.ids(prompt))
        log_probs = self.model(ids[None]).logits[0].double().log_softmax(-1)
        return log_probs[start - 1 : -1].gather(1, ids[start:, None]).sum().item()

    @torch.no_grad()
    def greedy(self, prompt: str) -> str:
        ids = self.ids(prompt)
        start = len(ids)
        for _ in range(N_NEW):
            ids.append(self.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        return self.tokenizer.decode(ids[start:]).split(self.tokenizer.eos_token)[0]


@pytest.fixture(scope="module")
def edited_folder(demo_model, demo_factors, tmp_path_factory):
    model, factors = copy.deepcopy(demo_model), load_factors(demo_factors)
    report = KFACEditor(model, factors, EditConfig(rho=0.6)).apply()
    folder = tmp_path_factory.mktemp("edited") / "model"
    fingerprint = factors.metadata["fingerprint"]
    save_edited(model, load_tokenizer("demo"), folder, report, source="demo", fingerprint=fingerprint)
    return folder


@pytest.fixture(scope="module")
def reference(edited_folder) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(edited_folder, dtype=torch.float32)
    return Reference(model.eval(), AutoTokenizer.from_pretrained(edited_folder))


@pytest.fixture(scope="module")
def local_tasks(reference, tmp_path_factory):
    """A folder of two tasks. Every other answer of the second one is what the edited model generates."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": prompt, "choices": choices, "right": 0, "answer": reference.greedy(prompt) + "." * (i % 2)}
        for i, (prompt, choices) in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    generate = {
        "task": "local_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": N_NEW, "do_sample": False, "until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, generate):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task), "utf-8")
    return folder


@pytest.fixture(scope="module")
def harness(edited_folder, local_tasks) -> dict:
    """What the harness says of them."""
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(edited_folder), "dtype": "float32"},
        tasks=["local_choice", "local_generate"],
        task_manager=TaskManager(include_path=str(local_tasks), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
    )


def in_order(harness: dict, task: str) -> list[dict]:
    return sorted(harness["samples"][task], key=lambda sample: sample["doc_id"])


def test_log_likelihoods_and_accuracy_are_those_of_plain_torch(harness, reference, demo_model):
    expected = [[reference.log_likelihood(prompt, c) for c in choices] for prompt, choices in QUESTIONS]
    found = [[pair[0] for pair in sample["filtered_resps"]] for sample in in_order(harness, "local_choice")]
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs == pytest.approx(ours, rel=3e-6, abs=3e-5)
    n_right = sum(first > second for first, second in expected)
    assert 0 < n_right < len(QUESTIONS)  # or equal accuracies would say nothing
    assert harness["results"]["local_choice"]["acc,none"] == n_right / len(QUESTIONS)
    # The edited weights were read: the unedited ones give other values.
    unedited = Reference(demo_model, reference.tokenizer)
    for (prompt, choices), theirs in zip(QUESTIONS, found, strict=True):
        assert abs(unedited.log_likelihood(prompt, choices[0]) - theirs[0]) > 0.01


def test_generated_text_is_that_of_plain_torch(harness, reference):
    found = [sample["filtered_resps"][0] for sample in in_order(harness, "local_generate")]
    assert found == [reference.greedy(prompt) for prompt, _ in QUESTIONS]
    assert all(found)
    assert harness["results"]["local_generate"]["exact_match,none"] == 0.5


def test_abilities_run_the_harness_and_read_its_logs(edited_folder, local_tasks, harness, tmp_path):
    """Both models; the scores of the edited one are those of the harness itself."""
    out = tmp_path / "abilities"
    options = {"model": edited_folder, "dtype": "float32", "questions": 0, "include": local_tasks, "output": out}
    edit("abilities", **options, tasks="[local_choice, local_generate]", **{"groups.local_choice": "logic"})
    found = {task["name"]: task for task in json.loads((out / "abilities.json").read_text())["tasks"]}
    assert {name: task["metric"] for name, task in found.items()} == {
        "local_choice": "acc",
        "local_generate": "exact_match",
    }
    assert found["local_choice"]["edited"][0] == harness["results"]["local_choice"]["acc,none"]
    assert found["local_generate"]["edited"][0] == 0.5 and found["local_choice"]["group"] == "logic"
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    theirs = {sample["doc_id"]: sample["acc"] for sample in in_order(harness, "local_choice")}
    ours = {int(row["document"].split()[0]): row["edited"] for row in rows if row["task"] == "local_choice"}
    assert ours == theirs


def test_tasks_that_the_harness_does_not_know(edited_folder, tmp_path, capsys):
    error = failed(capsys, "abilities", model=edited_folder, tasks="[no_such_task]", output=tmp_path / "a")
    assert "lm_eval knows no task no_such_task" in error
