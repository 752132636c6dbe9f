"""Devices and backends: on which device a process puts its tensors, and how the processes of a training communicate.

The environment variable OML_RAY_FAKE_GPUS=N simulates N GPUs, for tests on machines without any: a Ray that is started
here announces them and schedules on them, while tensors stay on the CPU and processes communicate by gloo. Every
process of the cluster must have the variable; those that Ray starts on this machine inherit it.
"""

from __future__ import annotations

import os

import torch

from oml_ray.errors import ResourceError

FAKE_GPUS = "OML_RAY_FAKE_GPUS"


def num_fake_gpus() -> int:
    """Read how many GPUs this machine simulates: 0 where it uses what it has.

    Raises:
        ResourceError: the environment variable is not a number.
    """
    text = os.environ.get(FAKE_GPUS) or "0"
    if not text.isdecimal():
        raise ResourceError(f"{FAKE_GPUS}: should be a number of GPUs, found {text!r}.")
    return int(text)


def device_of(use_gpu: bool) -> torch.device:
    """Choose the device of an actor or task: the first GPU that Ray has made visible to it, or the CPU."""
    return torch.device("cuda" if use_gpu and not num_fake_gpus() else "cpu")


def backend_of(use_gpu: bool) -> str:
    """Choose the backend of torch.distributed that fits the device: nccl or gloo."""
    return "nccl" if device_of(use_gpu).type == "cuda" else "gloo"


def batch_size_of(use_gpu: bool) -> int | None:
    """Choose the `batch_size` of Ray Data's `map_batches` whose rows are whole parts or blocks.

    Returns:
        1 with GPUs, where Ray Data refuses None; else None: the rows of a block in one call.
    """
    return 1 if use_gpu else None
