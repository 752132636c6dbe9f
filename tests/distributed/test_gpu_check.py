"""GPUs that PyTorch cannot use: found before anything is computed, on this machine and on a cluster that lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from helpers import train_config

from oml_ray.cli import main
from oml_ray.config import nodes
from oml_ray.distributed.runtime import devices, gpu_check
from oml_ray.distributed.runtime.resources import Needs, ProcessGroup
from oml_ray.distributed.session import session
from oml_ray.errors import ResourceError

NEEDS = Needs(1, 1, "tests", (ProcessGroup("workers", nodes.Placement(), cpus=1, gpus=1),))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a PyTorch that finds no GPU")


def test_one_seam_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.FAKE_GPUS, raising=False)
    assert [str(devices.device_of(use_gpu)) for use_gpu in (True, False)] == ["cuda", "cpu"]
    assert [devices.backend_of(use_gpu) for use_gpu in (True, False)] == ["nccl", "gloo"]
    monkeypatch.setenv(devices.FAKE_GPUS, "2")
    assert [str(devices.device_of(use_gpu)) for use_gpu in (True, False)] == ["cpu", "cpu"]
    assert [devices.backend_of(use_gpu) for use_gpu in (True, False)] == ["gloo", "gloo"]
    monkeypatch.setenv(devices.FAKE_GPUS, "some")
    with pytest.raises(ResourceError, match="OML_RAY_FAKE_GPUS: should be a number of GPUs, found 'some'"):
        devices.device_of(True)


@pytest.mark.parametrize(("verb", "flags"), [("train", []), ("train", ["--dry-run"]), ("sweep", ["--dry-run"])])
def test_a_machine_without_gpus_says_so_before_it_starts(
    verb: str, flags: list[str], small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv(devices.FAKE_GPUS, raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray is started"))
    config = train_config(small_table, tmp_path, scaling={"use_gpu": True})
    if verb == "sweep":
        space, tune = {"seed": {"grid": [1]}}, {"num_samples": 1}
        config = {"base": config, "run": {"name": "sweep", "storage": str(tmp_path)}, "space": space, "tune": tune}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([verb, str(tmp_path / "config.yaml"), *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith("oml-ray: scaling.use_gpu: 2 GPUs are needed, but PyTorch finds 0 on this machine (")
    assert error.count("\n") == 1


def test_simulated_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.FAKE_GPUS, "2")
    gpu_check.check_local_gpus(2)
    with pytest.raises(ResourceError, match="3 GPUs are needed, but PyTorch finds 2"):
        gpu_check.check_local_gpus(3)


@pytest.fixture
def listed_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster that lists a GPU, as where the driver is too old for PyTorch."""
    monkeypatch.delenv(devices.FAKE_GPUS, raising=False)
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("listed_gpu")
def test_a_gpu_that_ray_lists_and_pytorch_cannot_use() -> None:
    message = r"^scaling.use_gpu: Ray schedules GPUs on \S+, but PyTorch cannot use them: .* set scaling.use_gpu: false"
    with pytest.raises(ResourceError, match=message), session(NEEDS):
        pytest.fail("the session has begun")


def test_what_a_report_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 2024\n")
    monkeypatch.setattr(gpu_check, "DRIVER", tmp_path / "version")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    report = gpu_check.inspect_gpu()
    assert (report.driver, report.problem) == (
        "550.54.14", "The NVIDIA driver on your system is too old (found version 11040).",
    )  # fmt: skip
    assert "driver 550.54.14" in gpu_check.problem_of(report)
    usable = gpu_check.GpuReport("host", "550.54.14", "NVIDIA A100-SXM4-40GB", "8.0", has_bf16=True)
    assert str(usable) == "NVIDIA A100-SXM4-40GB (compute capability 8.0, bf16, driver 550.54.14)"


def test_a_card_that_pytorch_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is known, and the first kernel fails."""

    def no_kernel(*shape: int, device: str) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (3, 7))
    monkeypatch.setattr(torch, "ones", no_kernel)
    problem = gpu_check.problem_of(gpu_check.inspect_gpu())
    assert "no kernel image is available" in problem
    assert "card Tesla K80, compute capability 3.7" in problem
