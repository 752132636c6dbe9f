"""Resource requests: the CPUs, GPUs and placements that a verb holds, checked against the Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from oml_ray.config import nodes
from oml_ray.distributed.progress import say
from oml_ray.errors import ResourceError

# A runtime environment. Left alone, glibc gives what a batch frees back to the system, which zeroes it anew for the
# next batch: on CPUs that can cost twice what the network does. It reads these when a process starts; other libraries
# pass them over.
KEEP_MEMORY = {
    "env_vars": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
    }
}


@dataclass(frozen=True)
class Needs:
    """Logical resources that a verb holds at one time, and how they add up."""

    cpus: float
    gpus: float
    formula: str
    """How the CPUs add up, in config keys."""
    together: Mapping[str, int] = field(default_factory=dict)
    """Keys whose CPUs one process holds: they must be found on one node."""
    places: Mapping[str, nodes.Placement] = field(default_factory=dict)
    """Which nodes are used, by the keys of `scaling.placement`."""
    may_grow: bool = False
    """Whether what the cluster lacks is waited for."""

    def __or__(self, other: Needs) -> Needs:
        """What two stages need that run one after the other."""
        larger = self if self.cpus >= other.cpus else other
        return self._joined(other, larger.cpus, max(self.gpus, other.gpus), larger.formula)

    def __add__(self, other: Needs) -> Needs:
        """What two stages need that run at one time."""
        formula = f"{self.formula}, and {other.formula} = {other.cpus:g}"
        return self._joined(other, self.cpus + other.cpus, self.gpus + other.gpus, formula)

    def _joined(self, other: Needs, cpus: float, gpus: float, formula: str) -> Needs:
        together, places = {**self.together, **other.together}, {**self.places, **other.places}
        return Needs(cpus, gpus, formula, together, places, self.may_grow or other.may_grow)


def check_resources(needs: Needs) -> None:
    """Refuse what the connected Ray cluster cannot hold.

    Args:
        needs: logical resources of the verb.

    Raises:
        ResourceError: too few CPUs or GPUs, or no node has the labels and resources of a placement.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if needs.may_grow:
        say("what the Ray cluster lacks is waited for (scaling.autoscaling)")
        return
    _check_places(needs, alive)
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if cpus < needs.cpus:
        raise ResourceError(
            f"The Ray cluster has {cpus:g} CPUs, but {needs.cpus:g} are needed ({needs.formula}): "
            f"lower these keys, or add {needs.cpus - cpus:g} CPUs to the cluster."
        )
    largest = max(node["Resources"].get("CPU", 0.0) for node in alive)
    for key, wanted in needs.together.items():
        if wanted > largest:
            raise ResourceError(
                f"{key} is {wanted}, but the largest node of the Ray cluster has {largest:g} CPUs: lower it to at most "
                f"{largest:g}."
            )
    free: float = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    if free < needs.cpus:
        say(f"waiting for CPUs: {needs.cpus:g} are needed, {free:g} of the cluster's {cpus:g} are free")
    if gpus < needs.gpus:
        raise ResourceError(
            f"The Ray cluster has {gpus:g} GPUs, but {needs.gpus:g} are needed: set scaling.use_gpu: false, "
            "lower scaling.num_workers, evaluation.embed.actors or evaluation.gallery.shards, or add GPUs."
        )


def _check_places(needs: Needs, alive: list[dict[str, Any]]) -> None:
    """Refuse labels and resources that no node has: Ray would wait for one for ever."""
    for key, place in needs.places.items():
        if any(
            place.labels.items() <= (node.get("Labels") or {}).items()
            and all(node["Resources"].get(name, 0.0) >= amount for name, amount in place.resources.items())
            for node in alive
        ):
            continue
        labels = sorted({f"{name}: {value}" for node in alive for name, value in (node.get("Labels") or {}).items()
                         if not name.startswith("ray.io/node-id")})  # fmt: skip
        raise ResourceError(
            f"scaling.placement.{key}: no node of the Ray cluster has labels {place.labels} and resources "
            f"{place.resources}; the nodes' labels are {', '.join(labels) or 'none'}. Change the key, or start a node "
            "with them (ray start --labels, --resources)."
        )


def placed(place: nodes.Placement) -> dict[str, Any]:
    """Options of a Ray task or actor that run it where a placement says."""
    options: dict[str, Any] = {}
    if place.labels:
        options["label_selector"] = dict(place.labels)
    if place.resources:
        options["resources"] = dict(place.resources)
    return options
