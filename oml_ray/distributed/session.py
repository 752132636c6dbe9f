"""Ray sessions: connect to a cluster that is given, or start one on this machine; check that it has what is needed."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError
from ray.util import get_node_ip_address

from oml_ray.config import nodes
from oml_ray.distributed.progress import say
from oml_ray.errors import OmlRayError, ResourceError

CALLED_BACK = ("_remove", "__del__")  # by weak references, and by the end of an object
LATER_S = 0.01
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


def is_given() -> bool:
    """Whether a cluster is given (by RAY_ADDRESS, as in a Ray job, or by a session of this process)."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def session(needs: Needs, *, dashboard: bool = False) -> Iterator[None]:
    """Have a Ray session with the needed resources for the body of a `with`.

    Args:
        needs: on a given cluster they are checked; on this machine as many logical CPUs are declared.
        dashboard: start Ray's dashboard, where Ray is started.

    Raises:
        ResourceError: the given cluster has too few CPUs or GPUs, or cannot be reached.
    """
    quiet()
    started = not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if started:
            _start(needs, dashboard)
            _answer_sigterm(_interrupt)  # in place of what Ray has set
        _check(needs)
        yield
    finally:
        if started:
            _answer_sigterm(signal.SIG_IGN)  # half a shutdown would leave processes
            try:
                ray.shutdown()
            finally:
                _answer_sigterm(before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Answer a SIGTERM as Ctrl-C is answered."""
    inside = frame
    while inside is not None:
        if inside.f_code.co_name in CALLED_BACK:  # Python passes over what is raised here: a moment later
            threading.Timer(LATER_S, os.kill, (os.getpid(), number)).start()
            return
        inside = inside.f_back
    raise KeyboardInterrupt


def _answer_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Ray has set none either
        signal.signal(signal.SIGTERM, handler)


def check_given(needs: Needs) -> None:
    """Check the needs against the cluster that is given; without one there is nothing to check."""
    if is_given():
        with session(needs):
            pass


def quiet() -> None:
    """Keep Ray's own chatter out of the terminal: its log files have it all."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _start(needs: Needs, dashboard: bool) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about future defaults of Ray
            if address:
                ray.init(address=address, **options)
            else:
                cpus = max(os.cpu_count() or 1, math.ceil(needs.cpus))
                with _told_to_workers():
                    ray.init(
                        address="local",
                        num_cpus=cpus,
                        include_dashboard=dashboard,
                        # Its own even where there is none: Ray's actors would take what listens at 8265 for theirs, as
                        # Train's (2.60), which then ends a training whose controller another Ray does not know.
                        dashboard_port=_free_port(),
                        **options,
                    )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        where = f"The Ray cluster at {address} (RAY_ADDRESS)" if address else "Ray"
        raise ResourceError(f"{where} cannot be used: {' '.join(str(error).split())}") from None


@contextmanager
def _told_to_workers() -> Iterator[None]:
    """Have the workers of a Ray that is started in the body of a `with` know its address, and that it is one machine.

    Where several Rays run on one machine, those of Ray's actors that ask the dashboard (2.60: Train's, which give back
    what a stopped trial held) would not know which to ask. And nobody announces the end of the only machine: the actor
    that listens for that would take its part of the start.
    """
    port, ip = _free_port(), get_node_ip_address()  # type: ignore[no-untyped-call]
    given = {
        "RAY_GCS_SERVER_PORT": str(port),
        "RAY_ADDRESS": f"{ip}:{port}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _check(needs: Needs) -> None:
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


def user_error(error: BaseException | None) -> OmlRayError | None:
    """Find the user's error inside the wrappers that Ray puts around what a task, actor or worker raised."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        # A RayTaskError may also claim to be of its cause's type: only the cause itself has the message alone.
        if isinstance(current, OmlRayError) and not isinstance(current, RayTaskError):
            return current
        failures = getattr(current, "worker_failures", None)
        waiting += list(failures.values()) if isinstance(failures, dict) else []
        waiting += [
            getattr(current, name, None) for name in ("__context__", "__cause__", "controller_failure", "cause")
        ]
    return None


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the user's error alone where Ray raises it inside its own."""
    try:
        yield
    except Exception as error:  # what Ray raises may claim to be of the user's error's type
        found = user_error(error)
        if found is None or found is error:
            raise
        raise found from None
