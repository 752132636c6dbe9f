"""Benchmarks: every figure is a ratio of two things alternated in one run, with its spread.

Run as `python -m jobs.benchmark input --table TABLE` or `embed --table TABLE`, `decode`, `learning`, `memory`,
`peers`, `retrieval`, `sampling`, `scale`, `train` or `validation`, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks import decode, embed, learning, memory, peers, plot, retrieval, sampling, scale, train, validation
from jobs.benchmarks import input as input_suite
from jobs.benchmarks.figure import Figure
from oml_ray import build
from oml_ray.config import nodes
from oml_ray.errors import OmlRayError

SUITES: dict[str, Callable[..., Iterable[Figure]]] = {
    "input": input_suite.suite,
    "decode": decode.suite,
    "embed": embed.suite,
    "learning": learning.suite,
    "memory": memory.suite,
    "peers": peers.suite,
    "retrieval": retrieval.suite,
    "sampling": sampling.suite,
    "scale": scale.suite,
    "train": train.suite,
    "validation": validation.suite,
}

PARTS: dict[str, Sequence[str]] = {
    "embed": list(embed.NETWORKS),
    "peers": list(peers.PARTS),
    "retrieval": list(retrieval.PARTS),
}


def main() -> None:
    """Run a suite: print its table and write benchmark.json, each figure as soon as it is there; draw benchmark.svg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--table",
        help="table of real images for input, embed, peers and validation; without it, generated figures",
    )
    parser.add_argument("--root", help="what its paths are relative to")
    parser.add_argument("--rounds", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of embed, peers and retrieval")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[part for parts in PARTS.values() for part in parts],
        help="parts of those three",
    )
    parser.add_argument("--large", action="store_true", help="search ten million embeddings too")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parsed = parser.parse_args()
    options: dict[str, Any] = {"table": parsed.table, "root": parsed.root, "rounds": parsed.rounds}
    parts = PARTS.get(parsed.suite, ())
    if parsed.rounds < 1:
        parser.error(f"--rounds: should be at least 1, found {parsed.rounds}")
    unknown = sorted(set(parsed.only) - set(parts))
    if unknown:
        parser.error(f"--only: {parsed.suite} has no {', '.join(unknown)}, but {', '.join(parts) or 'no parts'}")
    if parts:
        options |= {"scale": parsed.scale, "only": parsed.only}
    if parsed.suite == "retrieval":
        options["large"] = parsed.large
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    try:
        if parsed.table is not None:  # before a suite starts processes that would each find the same fault
            build.table(nodes.Data(table=parsed.table, root=parsed.root), storage=str(parsed.out.parent))
        for figure in SUITES[parsed.suite](**options):
            if figure.setting and figure.setting not in [earlier.setting for earlier in figures]:
                print(f"\n{figure.setting}")
            figures.append(figure)
            print(figure.row(), flush=True)
            parsed.out.write_text(json.dumps([figure.document() for figure in figures], indent=1))
    except OmlRayError as error:
        parser.exit(2, f"{error}\n")
    finally:  # what is there stays if the next one fails
        if figures:
            plot.draw(figures, parsed.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
