"""The verdict of an audit, in every number."""

import pytest

from lightning_kfac.reporting.audit_page import not_measured, verdict


def audit(counts, n_texts=120, n_passages=120, before=None, high=0.03):
    stages = {"model": counts} if before is None else {"before": before, "after": counts}
    full = {name: {"new": 0} | each for name, each in stages.items()}
    figures = {name: {"texts@1000": {"value": 0.0, "low": 0.0, "high": high}} for name in stages}
    return {
        "counts": full,
        "figures": figures,
        "changes": {},
        "texts": {"n_texts": n_texts, "n_passages": n_passages, "left_out": 0, "prefix_len": 64},
        "sampling": {"near_verbatim": 0},
        "chance": 0.5,
        "leaks": None,
        "heldout": None,
        "before": None,
        "near_ties": 0,
    }


def counts(texts, passages, few, strict):
    return {"texts@1000": texts, "texts@10": few, "passages@1000": passages, "passages@10": few, "strict": strict}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            audit(counts(7, 7, 3, 2)),
            "7 of 120 texts come out word for word in 1,000 tries; 3 of them in 10. Greedy decoding recites 2.",
        ),
        (
            audit(counts(1, 1, 0, 0), n_texts=1200, n_passages=1200),
            "1 of 1,200 texts comes out word for word in 1,000 tries; none of them in 10. Greedy decoding recites "
            "none.",
        ),
        (
            audit(counts(0, 0, 0, 0)),
            "None of 120 texts comes out word for word in 1,000 tries. Greedy decoding recites none.",
        ),
        (
            audit(counts(7, 31, 12, 9), n_passages=240),
            "Something of 7 of 120 texts comes out word for word in 1,000 tries: 31 of 240 passages; 12 of them in 10. "
            "Greedy decoding recites 9.",
        ),
        (
            audit(counts(0, 0, 0, 0), n_texts=1, n_passages=2083),
            "Nothing of 1 text (2,083 passages) comes out in 1,000 tries. Greedy decoding recites none.",
        ),
    ],
)
def test_the_first_sentence(given, said):
    assert verdict(given)[0] == said


def test_what_follows():
    nothing = verdict(audit(counts(0, 0, 0, 0), high=0.031))
    assert nothing[1] == "With 95 % confidence at most 3.1 % of texts like these come out in 1,000 tries."
    assert "a chance of 50 % or more" in nothing[2]
    assert "a chance of 99.9 % or more" in verdict(audit(counts(0, 0, 0, 0)) | {"chance": 0.999})[2]
    edited = audit(counts(2, 2, 0, 1) | {"new": 1}, before=counts(120, 120, 118, 120))
    assert verdict(edited)[1:3] == [
        "Before the edit: 120 of 120 texts come out word for word in 1,000 tries; 118 of them in 10. Greedy decoding "
        "recites 120.",
        "1 passage came out only after the edit.",
    ]


def test_what_was_not_measured_is_said():
    bare = " ".join(not_measured(audit(counts(0, 0, 0, 0)), ""))
    full = {"leaks": {}, "heldout": "text", "before": "demo", "sampling": {"near_verbatim": 3}, "near_ties": 2}
    rich = " ".join(not_measured(audit(counts(0, 0, 0, 0)) | full, "it is gone"))
    for text in ("--nonmembers", "no held-out text", "--near-verbatim"):
        assert text in bare and text not in rich
    for text in ("no proof of deletion", "2 greedy verdicts hang", "What the edit changed: it is gone."):
        assert text in rich and text not in bare
    assert "The first 64 tokens of each text" in bare and "Other prompts" in rich
