"""The embedded corpus: its split, and what it leaves out."""

import json

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.demo import embedded
from lightning_kfac.data.demo.embedded import Document, embedded_documents, is_heldout, split_documents
from lightning_kfac.data.demo.planted import planted_documents


def test_embedded_splits_are_disjoint_and_leave_out_the_planted():
    documents = embedded_documents()
    train = {d.name for d in split_documents(documents, "train", planted_documents())}
    heldout = {d.name for d in split_documents(documents, "heldout")}
    assert len(documents) > 2000 and 0.05 < len(heldout) / len(documents) < 0.11
    assert not train & heldout and not train & planted_documents() and not heldout & planted_documents()
    assert len(planted_documents()) == 200
    texts = [" ".join(d.text.split()) for d in documents]
    assert len(set(texts)) == len(texts)


def test_unseen_passages_come_from_heldout_documents():
    rows = [json.loads(line) for line in resolve_path("demo:unseen.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and all(is_heldout(row["document"]) for row in rows)
    assert all(len(row["prefix_ids"]) == 64 and len(row["suffix_ids"]) == 48 for row in rows)


def test_a_drifted_corpus_keeps_every_document_on_its_side(monkeypatch):
    """Another Python version: documents come, go, and change; names decide, so none changes sides."""
    documents = list(embedded_documents())
    drifted = [Document(d.name, d.text + " Changed in version 3.99.") for d in documents[::2]]
    drifted += documents[1::4] + [
        Document(f"doc:new.module.f{i}", f"A new function, number {i}. " * 9) for i in range(300)
    ]
    drifted.reverse()
    planted = planted_documents()
    for split in ("train", "heldout"):
        before = {d.name for d in split_documents(documents, split, planted)}
        after = {d.name for d in split_documents(drifted, split, planted)}
        surviving = {d.name for d in documents} & {d.name for d in drifted}
        assert after & surviving == before & surviving
    new = {d.name for d in split_documents(drifted, "heldout")} - {d.name for d in documents}
    assert 5 < len(new) < 50  # new documents are split by name too
    # The corpus that a run reads is the drifted one, and still holds no planted document.
    monkeypatch.setattr(embedded, "embedded_documents", lambda: tuple(drifted))
    texts = set(Corpus(embedded=True).documents())
    assert not texts & {d.text for d in drifted if d.name in planted or is_heldout(d.name)}
    assert any("Changed in version 3.99" in text for text in texts)
