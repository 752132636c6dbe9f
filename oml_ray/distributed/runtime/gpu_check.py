"""Preflight of GPUs: whether PyTorch can use those that Ray schedules, found out before minutes of work.

Ray counts the GPUs that the NVIDIA driver lists. PyTorch may still refuse them: the driver is older than its CUDA, its
wheel has no kernels for the card, or it is a build for CPUs.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime.devices import num_fake_gpus
from oml_ray.errors import ResourceError, reason_of

DRIVER = Path("/proc/driver/nvidia/version")
TIMEOUT_S = 120
_checked: set[tuple[str, str]] = set()
"""Ray jobs and nodes whose GPUs this process has checked already."""


@dataclass(frozen=True)
class GpuReport:
    """Description by PyTorch of the first GPU that a process sees."""

    host: str
    driver: str
    """Version of the NVIDIA driver, or "unknown"."""
    card: str
    capability: str
    """Compute capability of the card, such as "8.0"."""
    has_bf16: bool
    """Whether the card computes in bfloat16."""
    problem: str = ""
    """Why PyTorch cannot use it; empty: it can."""

    def __str__(self) -> str:
        bf16 = "bf16" if self.has_bf16 else "no bf16"
        return f"{self.card} (compute capability {self.capability}, {bf16}, driver {self.driver})"


def inspect_gpu() -> GpuReport:
    """Run a small kernel on the first GPU that this process sees; never raises."""
    host, driver = platform.node(), _driver_version()
    card = capability = "unknown"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call] # says why where it fails, which is_available() does not
        card = torch.cuda.get_device_name(0)
        major, minor = torch.cuda.get_device_capability(0)
        capability = f"{major}.{minor}"
        ones = torch.ones(16, 16, device="cuda:0")
        if float((ones @ ones).sum()) != 16**3:
            raise RuntimeError("a matrix product is wrong")
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except (RuntimeError, AssertionError) as error:  # the latter: a PyTorch built without CUDA
        return GpuReport(host, driver, card, capability, False, reason_of(error))
    return GpuReport(host, driver, card, capability, has_bf16)


def _driver_version() -> str:
    try:
        versions = re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", DRIVER.read_text().splitlines()[0])
    except (OSError, IndexError):
        return "unknown"
    return versions[0] if versions else "unknown"


def check_gpus(gpu_nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check the GPUs of nodes of the connected cluster, one of each node, and say what they are.

    Args:
        gpu_nodes: nodes with GPUs, as `ray.nodes()` describes them. Those whose GPUs are all in use are left out.

    Raises:
        ResourceError: PyTorch cannot use a GPU; names the node, the driver, the card and its compute capability.
    """
    if num_fake_gpus():
        return
    job = ray.get_runtime_context().get_job_id()
    unchecked = [node["NodeID"] for node in gpu_nodes if (job, node["NodeID"]) not in _checked]
    if not unchecked:
        return
    _checked.update((job, node_id) for node_id in unchecked)
    tasks = [
        _inspect.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in unchecked
    ]
    ready, busy = ray.wait(tasks, num_returns=len(tasks), timeout=TIMEOUT_S)
    for task in busy:
        ray.cancel(task, force=True)
    reports = []
    for task in ready:
        try:
            reports.append(ray.get(task))
        except RayError as error:  # the process crashed, or its node is gone
            reason = reason_of(error)
            raise ResourceError(f"scaling.use_gpu: a process that uses a GPU ended at once: {reason}") from None
    for report in reports:
        if report.problem:
            raise ResourceError(problem_of(report))
    for text, count in Counter(map(str, reports)).items():
        say(f"# GPU: {text}" + f" on {count} nodes" * (count > 1))
    if busy:
        say(f"# GPUs of {len(busy)} nodes are in use by others: not checked")


def problem_of(report: GpuReport) -> str:
    """Describe a GPU that PyTorch cannot use, and what to do about it."""
    return (
        f"scaling.use_gpu: Ray schedules GPUs on {report.host}, but PyTorch cannot use them: {report.problem} (driver "
        f"{report.driver}, card {report.card}, compute capability {report.capability}; PyTorch {torch.__version__} is "
        f"built for CUDA {torch.version.cuda}). Update the NVIDIA driver, install a PyTorch that supports driver and "
        "card, or set scaling.use_gpu: false."
    )


@ray.remote(num_gpus=1, num_cpus=0, max_retries=0)
def _inspect() -> GpuReport:
    return inspect_gpu()


def check_local_gpus(gpus: float) -> None:
    """Check that this machine, where Ray is about to be started, has GPUs that PyTorch can use, or simulates them.

    Args:
        gpus: how many are needed.

    Raises:
        ResourceError: there are fewer.
    """
    if not gpus:
        return
    num = num_fake_gpus() or torch.cuda.device_count()
    if num >= gpus:
        return
    hint = ""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        hint = f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    elif not num and not num_fake_gpus():
        hint = f" ({inspect_gpu().problem})"
    raise ResourceError(
        f"scaling.use_gpu: {gpus:g} GPUs are needed, but PyTorch finds {num} on this machine{hint}: set "
        "scaling.use_gpu: false, run some stages on CPUs (scaling.gpu), lower scaling.num_workers or "
        "evaluation.embed.actors, or run on a Ray cluster with GPUs (RAY_ADDRESS)."
    )
