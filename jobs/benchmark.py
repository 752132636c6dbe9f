"""Benchmarks: every figure is a ratio of two things alternated in one run, with its spread.

Run as `python -m jobs.benchmark input --table TABLE` or `learning`, `memory` or `sampling`, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jobs.benchmarks import input as input_suite
from jobs.benchmarks import learning, memory, sampling

SUITES = {"input": input_suite.suite, "learning": learning.suite, "memory": memory.suite, "sampling": sampling.suite}


def main() -> None:
    """Run a suite, print its table and write benchmark.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--table", help="CSV or Parquet table of real images for the suite input; without it, generated figures"
    )
    parser.add_argument("--root", help="what its paths are relative to")
    parser.add_argument("--rounds", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parsed = parser.parse_args()
    figures = SUITES[parsed.suite](table=parsed.table, root=parsed.root, rounds=parsed.rounds)
    for figure in figures:
        print(figure.row())
    parsed.out.write_text(json.dumps([figure.document() for figure in figures], indent=1))


if __name__ == "__main__":
    main()
