"""Benchmarks: every figure is a ratio of two things alternated in one run, with its spread.

Run as `python -m jobs.benchmark input --table TABLE` or `embed --table TABLE`, `decode`, `learning`, `memory`,
`retrieval`, `sampling` or `validation`, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobs.benchmarks import decode, embed, learning, memory, retrieval, sampling, validation
from jobs.benchmarks import input as input_suite
from jobs.benchmarks.figure import Figure

SUITES: dict[str, Callable[..., Iterable[Figure]]] = {
    "input": input_suite.suite,
    "decode": decode.suite,
    "embed": embed.suite,
    "learning": learning.suite,
    "memory": memory.suite,
    "retrieval": retrieval.suite,
    "sampling": sampling.suite,
    "validation": validation.suite,
}


def main() -> None:
    """Run a suite, print its table and write benchmark.json, each figure as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--table",
        help="table of real images for input, embed and validation; without it, generated figures",
    )
    parser.add_argument("--root", help="what its paths are relative to")
    parser.add_argument("--rounds", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of embed and retrieval")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[*retrieval.PARTS, *embed.NETWORKS], help="parts of those two"
    )
    parser.add_argument("--large", action="store_true", help="search ten million embeddings too")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parsed = parser.parse_args()
    options: dict[str, Any] = {"table": parsed.table, "root": parsed.root, "rounds": parsed.rounds}
    if parsed.suite in ("embed", "retrieval"):
        options |= {"scale": parsed.scale, "only": parsed.only}
    if parsed.suite == "retrieval":
        options["large"] = parsed.large
    figures = []
    for figure in SUITES[parsed.suite](**options):
        figures.append(figure)
        print(figure.row(), flush=True)
        parsed.out.write_text(json.dumps([figure.document() for figure in figures], indent=1))


if __name__ == "__main__":
    main()
