"""Processes that start in a second instead of ten, and die where a test wants them to: runs of train.py or a module.

``python -m tests.forks`` imports everything once, then forks a process for each run that it reads from its standard
input: one JSON object a line. Nothing of a run is computed before a fork, so the copies are as good as new.
"""

import atexit
import faulthandler
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lightning_kfac.garbage import imports
from tests.tally import KILLED, tally

ROOT = Path(__file__).parents[1]
NATIVE_CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}
# What the interpreter reports of work on files; writes by safetensors (Rust) come between two of these.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@dataclass
class Run:
    """One process.

    Attributes:
        args: Of train.py, or of the module.
        module: What to run as ``python -m MODULE`` would; train.py where it is empty.
        log: File for what it prints.
        env: Further variables of the environment.
        kill_at: SIGKILL itself at the n-th piece of work on files below ``watched``.
        kill_after, term_after, interrupt_after: Send itself SIGKILL, SIGTERM or SIGINT so many seconds after the first
            of these.
        count_to: Write the number of these pieces of work there at the end.
        limit: Largest file that it may write, in bytes.
        reads: Files that are opened to be read count too.
        clock: Seconds that its clock is ahead.
        user: Number of the user that it runs as.
    """

    args: list[str]
    log: str
    module: str = ""
    watched: str = ""
    env: dict[str, str] = field(default_factory=dict)
    kill_at: int = 0
    kill_after: float = 0.0
    term_after: float = 0.0
    interrupt_after: float = 0.0
    count_to: str = ""
    limit: int = 0
    reads: bool = False
    clock: float = 0.0
    user: int = 0


class NativeCrash(AssertionError):
    """A process ended by a signal of its native libraries; no line of Python does that."""


class Forks:
    """The server, from a test's side."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "tests.forks"]
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, run: Run) -> int:
        """Begins a run; returns its process id."""
        self.server.stdin.write(json.dumps({"run": vars(run)}) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def wait(self, pid: int, timeout: float = 100.0) -> int:
        """The exit code of a run, negative for a signal; kills it where it takes too long."""
        self.server.stdin.write(json.dumps({"wait": pid, "timeout": timeout}) + "\n")
        self.server.stdin.flush()
        code = json.loads(self.server.stdout.readline())
        tally(KILLED, code == -signal.SIGKILL)
        return code

    def run(self, args: list[str], log: Path, **how) -> tuple[int, str]:
        """Runs train.py to its end: exit code, and what it printed."""
        code = self.wait(self.start(Run([str(word) for word in args], str(log), **how)))
        return code, Path(log).read_text("utf-8", errors="replace")

    def ranks(
        self, args: list[str], logs: Path, n: int, hows: dict[int, dict] | None = None, strategy: str = "ddp"
    ) -> list[tuple[int, str]]:
        """The same with n ranks, as torchrun would start them; ``hows`` by rank."""
        pids = self.start_ranks(args, logs, n, hows, strategy)
        codes = [self.wait(pid) for pid in pids]
        return [(code, rank_log(logs, r).read_text("utf-8", errors="replace")) for r, code in enumerate(codes)]

    def start_ranks(
        self, args: list[str], logs: Path, n: int, hows: dict[int, dict] | None = None, strategy: str = "ddp"
    ) -> list[int]:
        """Begins n ranks; returns their process ids."""
        args = [*map(str, args), "--trainer.devices", str(n), "--trainer.strategy", strategy]
        shared = _meeting(n)
        return [
            self.start(
                Run(args, str(rank_log(logs, r)), env=shared | {"LOCAL_RANK": str(r)}, **(hows or {}).get(r, {}))
            )
            for r in range(n)
        ]

    def run_on_ranks(self, module: str, folder: Path, n: int, timeout: float = 240) -> None:
        """``python -m MODULE FOLDER`` in n processes, as a launcher would; all must succeed."""
        shared = _meeting(n)
        logs = [folder / f"rank{rank}.log" for rank in range(n)]
        pids = [
            self.start(Run([str(folder)], str(log), module, env=shared | {"LOCAL_RANK": str(r), "RANK": str(r)}))
            for r, log in enumerate(logs)
        ]
        codes = [self.wait(pid, timeout) for pid in pids]
        said = [f"rank {r}:\n{log.read_text('utf-8', errors='replace')[-4000:]}" for r, log in enumerate(logs)]
        if NATIVE_CRASHES & set(codes):
            raise NativeCrash("\n".join(said))
        assert not any(codes), "\n".join(said)

    def close(self) -> None:
        """Ends the server."""
        self.server.stdin.close()
        self.server.wait(20)


@cache
def shared_forks() -> Forks:
    """The server of this process, begun where it is first needed."""
    forks = Forks()
    atexit.register(forks.close)
    return forks


def run_train(arguments: list[str]) -> None:
    """train.py in as many processes as it asks for devices; it must succeed."""
    options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    n, strategy = int(options.get("--trainer.devices", 1)), options.get("--trainer.strategy", "ddp")
    forks = shared_forks()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        ended = forks.ranks(arguments, log, n, strategy=strategy) if n > 1 else [forks.run(arguments, log)]
    for code, said in ended:
        assert code == 0, said


def _meeting(n: int) -> dict[str, str]:
    """The variables by which n ranks find each other."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n), "NODE_RANK": "0"}


def rank_log(logs: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return logs.with_suffix(f".{rank}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


# -- the server's side ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Reads requests until the standard input ends."""
    with imports():
        import transformers.generation.utils
        import transformers.models.olmo2.modeling_olmo2  # noqa: F401

        import lightning_kfac.cli.train  # noqa: F401 (the point of all this)
        from lightning_kfac.data.demo.embedded import embedded_documents

    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            if "embedded" in request["run"]["args"]:
                embedded_documents()  # thousands of docstrings, kept for all runs that follow
            pid = os.fork()
            if not pid:
                _child(Run(**request["run"]))
            print(json.dumps(pid), flush=True)
        else:
            pid, end = request["wait"], time.monotonic() + request["timeout"]
            while pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGUSR1)  # where it hangs
                    time.sleep(1)
                    os.kill(pid, signal.SIGKILL)
                    end += 1e9
                else:
                    time.sleep(0.01)
            print(json.dumps(codes[pid]), flush=True)


def _child(run: Run) -> None:
    log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(run.env)
    faulthandler.enable()  # a crash outside of Python says where it was called from
    faulthandler.register(signal.SIGUSR1)
    if run.limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (run.limit, run.limit))
    if run.clock:
        true_time = time.time
        time.time = lambda: true_time() + run.clock
        time.time_ns = lambda: int(1e9 * time.time())
    if run.user:
        os.setgid(run.user)
        os.setuid(run.user)
    count = _watch(run)
    code = 1
    try:
        _work(run)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if run.count_to:
            Path(run.count_to).write_text(str(count()))
        os._exit(code)


def _work(run: Run) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lightning_kfac.cli.train import main

    if run.module:
        rank_zero_only.rank = int(run.env.get("RANK", 0))  # read when Lightning was imported, before the fork
        sys.argv = [run.module, *run.args]
        runpy.run_module(run.module, run_name="__main__")
    else:
        sys.argv = ["train.py", *run.args]
        main(run.args)


def _watch(run: Run):
    """Counts work on files, and dies at the appointed piece."""
    seen, here = 0, os.getpid()

    def after(seconds: float, number: int) -> None:
        if seconds:
            timer = threading.Timer(seconds, os.kill, (here, number))
            timer.daemon = True
            timer.start()

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event not in EVENTS or not run.watched or run.watched not in str(args[0]):
            return
        if event == "open" and "r" in str(args[1]) and "+" not in str(args[1]) and not run.reads:
            return
        seen += 1
        if seen == run.kill_at:
            os.kill(here, signal.SIGKILL)
        if seen == 1:
            after(run.kill_after, signal.SIGKILL)
            after(run.term_after, signal.SIGTERM)
            after(run.interrupt_after, signal.SIGINT)

    sys.addaudithook(hook)
    return lambda: seen


if __name__ == "__main__":
    serve()
