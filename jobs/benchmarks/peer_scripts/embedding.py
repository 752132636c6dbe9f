"""Embedding the images of a table, repeated as needed: all of them, and a quarter; with any library."""

from __future__ import annotations

from collections.abc import Callable

from jobs.benchmarks.peer_scripts.measured import Checked, options, report

WARM_UP_IMAGES = 256

Embed = Callable[[int], Checked]
"""Number of images -> means over the values of their embeddings, which tell networks and pixels apart."""


def run(embed: Embed) -> None:
    """Run a side: some images to warm up, a quarter, then all."""
    images = options()["images"]
    embed(min(images, WARM_UP_IMAGES))
    report({"quarter": lambda: embed(max(1, images // 4)), "whole": lambda: embed(images)})
