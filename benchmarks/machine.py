"""Where a benchmark runs, whether it has the machine to itself, and timing that holds where it has not.

A ratio of CPU times survives other work on the machine, a ratio of wall times does not: both are taken from pairs of
runs that follow each other, in an order that turns round every time, and given as the median over pairs.
"""

import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Of x86 and of ARM: those that decide how fast matrices are multiplied.
INSTRUCTION_SETS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16", "asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm", "sme",
)  # fmt: skip
# The share of the cores that others may use before a benchmark draws no conclusion.
BUSY = 0.05
STAT = Path("/proc/stat")
IDLE_COLUMNS = (3, 4)  # idle, and idle while waiting for a disk
COUNTED_COLUMNS = 8  # what comes after is time of virtual machines, which is counted already

Times = dict[str, dict[str, list[float]]]


def machine() -> dict[str, Any]:
    """What a run took place on."""
    cuda = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    names = _fields(_cpuinfo(), "model name")
    return names[0] if names else platform.machine()


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """Those of ``INSTRUCTION_SETS`` that the processor has; none where nothing tells.

    Args:
        cpuinfo: Text as in /proc/cpuinfo; by default this machine's.
    """
    text = _cpuinfo() if cpuinfo is None else cpuinfo
    lines = [*_fields(text, "flags"), *_fields(text, "Features")]
    known = set(lines[0].split()) if lines else set()
    return [name for name in INSTRUCTION_SETS if name in known]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8") if path.is_file() else ""


def _fields(cpuinfo: str, name: str) -> list[str]:
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def cpu_seconds() -> float:
    """CPU time of this process and of the processes that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Reading(NamedTuple):
    """A look at the clocks.

    Attributes:
        wall: Seconds.
        busy: Seconds that all cores have worked for anybody; None where the system does not tell.
        own: CPU seconds of this process and its children.
    """

    wall: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> "Reading":
        """The clocks now."""
        busy = busy_seconds(STAT.read_text("utf-8")) if STAT.is_file() else None
        return cls(time.perf_counter(), busy, cpu_seconds())

    def others(self, earlier: "Reading") -> float | None:
        """Cores that other processes have kept busy since an earlier reading."""
        if self.busy is None or earlier.busy is None:
            return None
        used = (self.busy - earlier.busy) - (self.own - earlier.own)
        return max(0.0, used / (self.wall - earlier.wall))


def busy_seconds(stat: str) -> float:
    """Seconds that all cores have worked, from text as in /proc/stat."""
    ticks = [int(word) for word in stat.split("\n", 1)[0].split()[1:]][:COUNTED_COLUMNS]
    working = sum(ticks) - sum(ticks[column] for column in IDLE_COLUMNS)
    return working / os.sysconf("SC_CLK_TCK")


class Watch:
    """Watches what else the machine does during a benchmark. Made at its begin, when it prints its first line.

    Args:
        seconds: How long to look before anything is measured.
    """

    def __init__(self, seconds: float = 1.0):
        earlier = Reading.now()
        time.sleep(seconds)
        self._begin = Reading.now()
        self.at_start = self._begin.others(earlier)
        print(self.first_line(), flush=True)

    def first_line(self) -> str:
        """Whether this will end in a conclusion."""
        if self.at_start is None:
            return "this system does not tell what other processes use: ratios below are of CPU time"
        used = f"other processes use {self.at_start:.1f} of {os.cpu_count()} cores"
        if not is_busy(self.at_start):
            return f"the machine is quiet: {used}"
        return f"the machine is busy: {used}; ratios below are of CPU time, wall times do not count"

    def about(self) -> dict[str, Any]:
        """The machine, what others have used of it so far, and whether a conclusion may be drawn."""
        during = Reading.now().others(self._begin)
        busy = is_busy(self.at_start) or is_busy(during)
        load = {"others_at_start": self.at_start, "others_during": during, "busy": busy, "concluded": not busy}
        return machine() | load

    def conclude(self, verdict: str) -> None:
        """Prints a verdict, or that there is none."""
        about = self.about()
        if about["concluded"]:
            print(verdict)
            return
        used = max(about["others_at_start"] or 0, about["others_during"] or 0)
        print(
            f"no conclusion: other processes used {used:.1f} of {os.cpu_count()} cores; run it again when it is quiet"
        )


def is_busy(others: float | None) -> bool:
    """Whether others use more than ``BUSY`` of all cores; where nobody knows, yes."""
    return others is None or others > BUSY * (os.cpu_count() or 1)


class Seconds(NamedTuple):
    """A time by two clocks."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Seconds":
        """Both clocks now; on a GPU once it has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), cpu_seconds())

    def since(self, earlier: "Seconds") -> "Seconds":
        """What has passed."""
        return Seconds(self.wall - earlier.wall, self.cpu - earlier.cpu)


def clocked(run: Callable[[], object]) -> Seconds:
    """The time of one call; or what it says itself, if it gives ``Seconds``."""
    begin = Seconds.now()
    result = run()
    return result if isinstance(result, Seconds) else Seconds.now().since(begin)


def pairs(ways: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> Times:
    """Times several ways to do the same in turn, every other round in the opposite order.

    Args:
        ways: What is timed, by name; one that gives ``Seconds`` times itself.
        repeats: Rounds.
        warm_up: Rounds before these that are not counted.

    Returns:
        For each way the ``wall`` and ``cpu`` seconds of each round.
    """
    times: Times = {name: {"wall": [], "cpu": []} for name in ways}
    for number in range(-warm_up, repeats):
        gc.collect()  # outside of what is timed
        for name in ways if number % 2 == 0 else reversed(ways):
            taken = clocked(ways[name])
            if number >= 0:
                times[name]["wall"].append(taken.wall)
                times[name]["cpu"].append(taken.cpu)
    return times


def ratios(times: Times, name: str, beside: str) -> dict[str, float]:
    """How many times as long a way takes as another: the median over rounds, of ``wall`` and of ``cpu`` time."""
    paired = {clock: zip(times[name][clock], times[beside][clock], strict=True) for clock in ("wall", "cpu")}
    return {clock: statistics.median(a / b for a, b in both) for clock, both in paired.items()}


def medians(times: Times) -> dict[str, dict[str, float]]:
    """The median seconds of each way, of ``wall`` and of ``cpu`` time."""
    return {name: {clock: statistics.median(values) for clock, values in of.items()} for name, of in times.items()}
