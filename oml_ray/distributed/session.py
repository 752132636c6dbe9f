"""Ray sessions: connect to a cluster that is given, or start one on this machine; check that it has what is needed."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.data import DataContext

from oml_ray.distributed.runtime import local_ray
from oml_ray.distributed.runtime.devices import num_fake_gpus
from oml_ray.distributed.runtime.gpu_check import check_local_gpus
from oml_ray.distributed.runtime.resources import Needs, check_resources
from oml_ray.errors import ResourceError
from oml_ray.storage import retries

CALLED_BACK = ("_remove", "__del__")  # by weak references, and by the end of an object
LATER_S = 0.01


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
            if not is_given():
                check_local_gpus(needs.gpus)
            _start(needs, dashboard)
            _answer_sigterm(_interrupt)  # in place of what Ray has set
        check_resources(needs)
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
    """Check the needs against the cluster that is given; without one, the GPUs of this machine."""
    if not is_given():
        check_local_gpus(needs.gpus)
        return
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
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            # Processes of a cluster do not inherit the environment of this one. None where all are the defaults:
            # processes with an environment of their own start later.
            variables = retries.environment()
            local_ray.connect(address=address, runtime_env={"env_vars": variables} if variables else None)
        else:
            num_cpus = max(os.cpu_count() or 1, math.ceil(needs.cpus))
            # Without simulated GPUs Ray counts those of the machine.
            local_ray.start(num_cpus, num_gpus=num_fake_gpus() or None, dashboard=dashboard)
    except Exception as error:  # of many kinds
        where = f"The Ray cluster at {address} (RAY_ADDRESS)" if address else "Ray"
        raise ResourceError(f"{where} cannot be used: {' '.join(str(error).split())}") from None
