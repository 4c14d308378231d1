"""Counts of what the tests of docs/trust.md did: kills, damage, hostile inputs; ``make trust`` writes them there.

``python -m tests.tally`` runs those tests in one process. Helpers that kill or damage something say so to ``tally``.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "trust.md"
BEGIN = "<!-- What follows is written by `make trust`. -->\n"
# The tests that count, by what a case of theirs is.
CASES = {
    "configs, names and switches": ["cli/test_foreign_code.py", "cli/test_parsers.py"],
    "models and tokenizers": [
        "models/test_sizes.py",
        "models/test_model_folder.py",
        "models/test_tokenizer_identity.py",
    ],
    "corpora and sets": ["data/test_records.py", "data/test_set_formats.py", "data/test_token_files.py"],
    "text in what is shown": ["test_console.py", "cli/test_quiet.py", "reporting/test_escape.py"],
    "files of others and of earlier runs": [
        "storage/test_manifest.py",
        "storage/test_run_folder.py",
        "storage/test_output_folder.py",
        "storage/test_earlier.py",
        "cli/test_folders.py",
    ],
    "damage, and disks that fail": [
        "storage/test_damage.py",
        "storage/test_fuzz.py",
        "storage/test_keyed_log.py",
        "data/test_tokenized.py",
    ],
    "stops, kills and odd circumstances of runs": [
        "callbacks/collection/test_faults.py",
        "callbacks/collection/test_circumstances.py",
        "callbacks/test_mining.py",
    ],
}
KILLED = "processes killed, each followed by a look at what is left"
DAMAGED = "files damaged by bits, cuts and swaps, each read again"
MUTATED = "mutated files, rows and configs"
COUNTS: Counter[str] = Counter()


def tally(kind: str, number: int = 1) -> None:
    """Counts something that a test has done."""
    COUNTS[kind] += number


class _Passed:
    """A plugin that counts the cases that pass, by file."""

    def __init__(self):
        self.by_file: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.by_file[report.nodeid.partition("::")[0].removeprefix("tests/")] += 1


def table(passed: Counter[str]) -> str:
    """The two tables of the page."""
    lines = ["| what the tests did | how often |", "|---|---|"]
    lines += [f"| {kind} | {COUNTS[kind]:,} |" for kind in (KILLED, DAMAGED, MUTATED)]
    lines += ["", "| tests of | files | passed |", "|---|---|---|"]
    for kind, files in CASES.items():
        names = ", ".join(f"`{file}`" for file in files)
        lines.append(f"| {kind} | {names} | {sum(passed[file] for file in files):,} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the tests and writes the counts; pytest's exit status."""
    passed = _Passed()
    files = [str(ROOT / "tests" / file) for files in CASES.values() for file in files]
    # The module that the tests import, not this one that runs.
    from tests.tally import COUNTS as counted

    status = pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files], plugins=[passed])
    if status == 0:
        COUNTS.update(counted)
        DOCS.write_text(DOCS.read_text("utf-8").partition(BEGIN)[0] + BEGIN + "\n" + table(passed.by_file), "utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
