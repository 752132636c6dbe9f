"""What nodes and components have in common: the names of arguments."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from oml_ray.config import nodes


def arguments(node: nodes.Node, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Give a node's plain values as arguments; its name, the nodes in it and those of `without` are left out."""
    return {key: value for key, value in node if key not in ("name", *without) and not isinstance(value, nodes.Node)}
