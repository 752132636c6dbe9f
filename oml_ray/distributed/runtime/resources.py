"""Resource requests: the CPUs, GPUs and placements that a verb holds, checked against the Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from oml_ray.config import nodes
from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime.gpu_check import check_gpus
from oml_ray.errors import ResourceError

SMALLEST_SHARES = 10_000  # of a GPU: Ray counts resources in these
ROUNDING = 1e-6

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
class ProcessGroup:
    """Processes of one stage that run at one time, each of which one node must hold."""

    stage: str
    """Key of `scaling.placement`."""
    placement: nodes.Placement
    num: int = 1
    num_key: str = ""
    """Config key of `num`."""
    cpus: float = 0
    """CPUs of each process."""
    cpus_key: str = ""
    """Config key of `cpus`."""
    gpus: float = 0
    """GPUs of each process, or the share of one."""

    def room_on(self, node: Mapping[str, Any]) -> int:
        """Count the processes that an empty node, as `ray.nodes()` describes it, has room for: at most `num`."""
        if not self._is_selected(node):
            return 0
        needed = {"CPU": self.cpus, "GPU": self.gpus, **self.placement.resources}
        rooms = [int(node["Resources"].get(name, 0.0) / each + ROUNDING) for name, each in needed.items() if each]
        return min([self.num, *rooms])

    def selected(self, alive: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Select the nodes that have the placement's labels and, for one process, its custom resources."""
        return [node for node in alive if self._is_selected(node)]

    def _is_selected(self, node: Mapping[str, Any]) -> bool:
        return self.placement.labels.items() <= (node.get("Labels") or {}).items() and all(
            node["Resources"].get(name, 0.0) >= amount for name, amount in self.placement.resources.items()
        )


@dataclass(frozen=True)
class Needs:
    """Logical resources that a verb holds at one time, and how they add up."""

    cpus: float
    gpus: float
    formula: str
    """How the CPUs add up, in config keys."""
    groups: tuple[ProcessGroup, ...] = ()
    """The processes that hold them, stage by stage."""
    may_grow: bool = False
    """Whether the cluster adds what it lacks (scaling.autoscaling)."""

    def __or__(self, other: Needs) -> Needs:
        """Resources of two stages that run one after the other."""
        larger = self if self.cpus >= other.cpus else other
        return self._joined(other, larger.cpus, max(self.gpus, other.gpus), larger.formula)

    def __add__(self, other: Needs) -> Needs:
        """Resources of two stages that run at one time."""
        formula = f"{self.formula}, and {other.formula} = {other.cpus:g}"
        return self._joined(other, self.cpus + other.cpus, self.gpus + other.gpus, formula)

    def _joined(self, other: Needs, cpus: float, gpus: float, formula: str) -> Needs:
        groups = [*self.groups, *(group for group in other.groups if group not in self.groups)]
        return Needs(cpus, gpus, formula, tuple(groups), self.may_grow or other.may_grow)


def check_resources(needs: Needs) -> None:
    """Refuse what the connected Ray cluster cannot hold, which Ray would wait for without end.

    Args:
        needs: logical resources of the verb.

    Raises:
        ResourceError: too few CPUs or GPUs, no node for one of the processes, or a GPU that PyTorch cannot use.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if needs.may_grow:
        _say_awaited(needs, cpus, gpus)
    else:
        _check_sizes(needs, alive, cpus, gpus)
    if needs.gpus:
        check_gpus([node for node in alive if any(group.gpus and group.room_on(node) for group in needs.groups)])


def _check_sizes(needs: Needs, alive: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> None:
    """Refuse what the present nodes, with `cpus` and `gpus` in all, cannot hold."""
    for group in needs.groups:
        _check_selected(group, alive)
    if cpus < needs.cpus:
        raise ResourceError(
            f"The Ray cluster has {cpus:g} CPUs, but {needs.cpus:g} are needed ({needs.formula}): "
            f"lower these keys, or add {needs.cpus - cpus:g} CPUs to the cluster."
        )
    if gpus < needs.gpus:
        switches = ", ".join(dict.fromkeys(f"scaling.gpu.{group.stage}" for group in needs.groups if group.gpus))
        raise ResourceError(
            f"The Ray cluster has {gpus:g} GPUs, but {needs.gpus:g} are needed: set scaling.use_gpu (or {switches}) to "
            "false, lower scaling.num_workers or evaluation.embed.actors, or add GPUs."
        )
    for group in needs.groups:
        _check_room(group, alive)
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    for name, needed, total in (("CPU", needs.cpus, cpus), ("GPU", needs.gpus, gpus)):
        if free.get(name, 0.0) < needed:
            unused = free.get(name, 0.0)
            say(f"waiting for {name}s: {needed:g} are needed, {unused:g} of the cluster's {total:g} are free")


def _say_awaited(needs: Needs, cpus: float, gpus: float) -> None:
    lacking = {"CPUs": needs.cpus - cpus, "GPUs": needs.gpus - gpus}
    parts = [f"{amount:g} {name}" for name, amount in lacking.items() if amount > 0]
    what = " and ".join(parts) or "nodes where the present ones do not suffice"
    say(f"waiting for the autoscaler to add {what} (scaling.autoscaling: true)")


def _check_selected(group: ProcessGroup, alive: Sequence[Mapping[str, Any]]) -> None:
    """Refuse labels and custom resources that no node has, or only nodes without GPUs."""
    key, place = f"scaling.placement.{group.stage}", group.placement
    selected = group.selected(alive)
    if not selected:
        labels = sorted({f"{name}: {value}" for node in alive for name, value in (node.get("Labels") or {}).items()
                         if not name.startswith("ray.io/node-id")})  # fmt: skip
        raise ResourceError(
            f"{key}: no node of the Ray cluster has labels {place.labels} and resources {place.resources}; the nodes' "
            f"labels are {', '.join(labels) or 'none'}. Change the key, or start a node with them (ray start --labels, "
            "--resources)."
        )
    if not group.gpus or group.placement == nodes.Placement():
        return
    if not any(node["Resources"].get("GPU", 0.0) for node in selected):
        raise ResourceError(
            f"scaling.gpu.{group.stage}: GPUs are asked for, but the {len(selected)} nodes that {key} selects (labels "
            f"{place.labels}, resources {place.resources}) have none: set scaling.gpu.{group.stage}: false, or change "
            f"{key}."
        )


def _check_room(group: ProcessGroup, alive: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that no node is large enough for, or that do not all fit on the nodes of their placement."""
    selected = group.selected(alive)
    largest = max(node["Resources"].get("CPU", 0.0) for node in selected)
    if group.cpus > largest:
        where = "node" if group.placement == nodes.Placement() else f"node that scaling.placement.{group.stage} selects"
        raise ResourceError(
            f"{group.cpus_key} is {group.cpus:g}, but the largest {where} of the Ray cluster has {largest:g} CPUs: "
            f"lower it to at most {largest:g}."
        )
    room = sum(group.room_on(node) for node in selected)
    if room < group.num:
        parts = {"CPUs": group.cpus, "GPUs": group.gpus, **group.placement.resources}
        each = ", ".join(f"{amount:g} {name}" for name, amount in parts.items() if amount)
        raise ResourceError(
            f"{group.num_key}: {group.num} processes of {each} each are needed at one time, but the nodes that "
            f"scaling.placement.{group.stage} selects have room for {room}: lower it, or add nodes."
        )


def gpu_share(group: ProcessGroup, alive: Sequence[Mapping[str, Any]], most_gpus: int | None = None) -> float:
    """Compute the share of a GPU that each of a group's processes takes, so that they spread over all GPUs.

    Ray puts fractions of a GPU on as few GPUs as it can.

    Args:
        group: its processes; `gpus` is not read.
        alive: nodes, as `ray.nodes()` describes them.
        most_gpus: GPUs that the group may hold; None: all of the nodes that its placement selects.

    Returns:
        1 where every process gets a GPU of its own; else 1 / (the fewest processes on a GPU with which all have room),
        rounded down to what Ray counts, or 1 / num where they never have.
    """
    selected = group.selected(alive)

    def room(per_gpu: int) -> int:
        shared = replace(group, gpus=1 / per_gpu)
        slots = sum(shared.room_on(node) for node in selected)
        return slots if most_gpus is None else min(slots, most_gpus * per_gpu)

    per_gpu = next((count for count in range(1, group.num) if room(count) >= group.num), group.num)
    return int(SMALLEST_SHARES / per_gpu) / SMALLEST_SHARES


def count_gpus(placement: nodes.Placement) -> int:
    """Count the GPUs of the connected cluster's nodes that a placement selects."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return int(sum(node["Resources"].get("GPU", 0.0) for node in ProcessGroup("", placement).selected(alive)))


def placed(place: nodes.Placement) -> dict[str, Any]:
    """Options of a Ray task or actor that run it where a placement says."""
    options: dict[str, Any] = {}
    if place.labels:
        options["label_selector"] = dict(place.labels)
    if place.resources:
        options["resources"] = dict(place.resources)
    return options
