"""Mutates the pure functions, one module at a time, and counts what the test file beside each module kills.

    python -m tests.mutation                      every module of math/ and metrics/functional/
    python -m tests.mutation math/selection       one of them

mutmut does the work. Each module has a folder of its own in ``.mutation``, in which mutmut sees this one module and
this one test file: an interrupted run goes on there, and starts again where a module or the test file has changed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_kfac"
ROOMS = ("math", "metrics/functional")
SHARED = ("tests/common.py", "tests/oracle.py", "tests/mutation.py")
# A message is no behaviour: lines that raise one, or that are nothing but a string, are left alone. A torch that has
# computed does not fork well, hence the fork server. pytest's last search for unraised exceptions walks all of torch's
# objects, which costs three times what the tests cost.
CONFIGURATION = """
[tool.mutmut]
source_paths = ["lightning_kfac"]
only_mutate = ["lightning_kfac/{module}.py"]
do_not_mutate_patterns = ['raise \\w+\\(', '^\\s*f?".*"$']
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "--noconftest", "--timeout=15"]
pytest_add_cli_args_test_selection = ["{test}"]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_constant = 6.0
timeout_multiplier = 5.0

[tool.pytest.ini_options]
"""


def modules() -> list[str]:
    """Names of all modules to mutate: math/bands, ..."""
    found = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py")) if path.name != "__init__.py"]
    return [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in found]


def undecorated(source: str) -> str:
    """mutmut leaves decorated functions alone: decorators of a module's functions move to the end of the module."""
    decorated = re.compile(r"^@(.+)\n(?=def (\w+))", re.MULTILINE)
    moved = [f"\n{name} = {decorator}({name})\n" for decorator, name in decorated.findall(source)]
    return decorated.sub("", source) + "".join(moved)


def prepared(module: str) -> Path:
    """The folder in which mutmut works on a module: empty of results where these no longer hold."""
    room, _, name = module.rpartition("/")
    test = f"tests/{room}/test_{name}.py"
    sources = [*(f"lightning_kfac/{other}.py" for other in modules()), test, *SHARED]
    key = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in sources)).hexdigest()
    folder = ROOT / ".mutation" / module.replace("/", ".")
    if not (folder / "key").exists() or (folder / "key").read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        for copied in ("lightning_kfac", "tests"):
            shutil.copytree(
                ROOT / copied, folder / copied, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
            )
        mutated = folder / "lightning_kfac" / f"{module}.py"
        mutated.write_text(undecorated(mutated.read_text()))
        (folder / "pyproject.toml").write_text(CONFIGURATION.format(module=module, test=test))
        (folder / "key").write_text(key)
    return folder


def mutmut(folder: Path, *arguments: str) -> str:
    """What mutmut prints, which must succeed."""
    command = [Path(sys.executable).with_name("mutmut"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mutmut {arguments[0]} failed in {folder}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def mutate(module: str) -> Counter:
    """How many mutants of a module met which fate; prints those that were not killed as differences."""
    folder = prepared(module)
    mutmut(folder, "run", "--max-children", "1")
    fates = dict(line.strip().split(": ") for line in mutmut(folder, "results", "--all", "true").splitlines())
    for name, fate in fates.items():
        if fate not in ("killed", "timeout"):
            print(mutmut(folder, "show", name))
    return Counter(fates.values())


def main(names: list[str]) -> None:
    rows = {name: mutate(name) for name in names or modules()}
    for name, counts in rows.items():
        killed, total = counts["killed"] + counts["timeout"], counts.total()
        print(f"{name:32} {killed:4} of {total:4} killed ({killed / total:.1%}), {counts['timeout']} of them by time")


if __name__ == "__main__":
    main(sys.argv[1:])
