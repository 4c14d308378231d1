"""Everything that a GPU should be asked, most valuable first; each part's JSON is there as soon as it is done.

    python -m benchmarks.gpu                          # one GPU of 80 GB, at most 8 minutes
    python -m benchmarks.gpu --parts collection       # some of it
    python -m benchmarks.gpu --small --device cpu     # the same path at small sizes, 1 minute

A step that fails says so in its file and the next one begins; a part whose time is up leaves the rest out.
Writes benchmarks/results/gpu/*.json.
"""

import argparse
from pathlib import Path

from benchmarks.gpu import algebra, collection, correctness, experts, forecast, ranks
from benchmarks.gpu.parts import Part

PARTS = {
    "correctness": (correctness.run, 60),
    "collection": (collection.run, 230),
    "algebra": (algebra.run, 70),
    "ranks": (ranks.run, 90),
    "experts": (experts.run, 60),
    "forecast": (forecast.run, 30),
}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "gpu")
    options = parser.parse_args()
    for name in options.parts:
        run, budget = PARTS[name]
        part = Part(name, options.output, options.device, options.small, budget)
        run(part)
        part.write()
        part.free()


if __name__ == "__main__":
    main()
