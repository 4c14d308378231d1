"""Local means local: a whole run on local files opens no connection."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tests.common import results, small
from tests.forks import ROOT

# Whatever wants to connect, or to know an address, ends the run; so does the package that reads data sets of the hub.
GUARDED = """
import socket, sys

class _Refused(BaseException):
    pass

def refuse(*args, **kwargs):
    raise _Refused(f"a connection: {args}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
sys.modules["datasets"] = None

from lightning_kfac.cli.main import main
main(sys.argv[1:])
"""


def test_a_run_on_local_files_opens_no_connection(tmp_path, few):
    text = "Return the value for key if key is in the dictionary, else default. "
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"{number} {text}" * 4)
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(9)))
    pq.write_table(pa.table({"text": [f"{number} {text}" for number in range(9)]}), corpus / "a.parquet")
    heldout = tmp_path / "heldout"
    Dataset.from_dict({"text": [f"{text} {number}" for number in range(90)]}).save_to_disk(heldout)
    options = small(tmp_path / "run", few, **{"data.corpus": corpus, "data.heldout": heldout, "data.batch_size": 2})
    online = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, "fit", *options],
        cwd=ROOT, env=online, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 tokens of" in done.stderr and "of 78 documents" in done.stderr
    assert [row["stage"] for row in results(tmp_path / "run")] == ["baseline"]
    metadata = json.loads((tmp_path / "run" / "factors" / "metadata.json").read_text())
    assert metadata["n_documents"] >= 5
