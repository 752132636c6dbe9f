"""Failures of processes: one error of oml_ray with the work's name and the reason, and a bounded number of tries."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray
import torch
from helpers import train_config
from ray.data import ActorPoolStrategy
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError, WorkerCrashedError
from ray.exceptions import OutOfMemoryError as KilledForMemoryError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from oml_ray import build
from oml_ray.config import TrainConfig, nodes, validate
from oml_ray.distributed import trainer
from oml_ray.distributed.controller import StopOnFailedStarts, StopOnFinalError
from oml_ray.distributed.gallery import GalleryPool
from oml_ray.distributed.runtime.bounded_map import map_batches
from oml_ray.distributed.runtime.failures import actor_options, final_error, translated, unwrapped
from oml_ray.distributed.shard import Part
from oml_ray.distributed.stream import configure
from oml_ray.errors import EmbeddingError, ImageError, OutOfMemoryError, ProcessDiedError
from oml_ray.training.run_directory import RunDirectory

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.00 GiB"
TRACEBACK = f"""ray::Shard.call() (pid=1)
  File "x.py", line 1, in f
    raise RuntimeError("CUDA out of memory " + size)
torch.OutOfMemoryError: {CUDA}"""


def task_error(cause: Exception, text: str = "Traceback\nfailed") -> Exception:
    """What `ray.get` raises for an error of a task."""
    error: Exception = RayTaskError("f", text, cause, "ray::f", 1, "127.0.0.1").as_instanceof_cause()
    return error


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


OUT_OF_MEMORY: dict[str, tuple[Exception, str]] = {
    "torch, in a task": (task_error(torch.OutOfMemoryError(CUDA)), CUDA),
    "torch, as text alone": (task_error(ValueError("UDF failed"), TRACEBACK), CUDA),
    "of a GPU that is full at the start": (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
    "torch on CPUs": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        "you tried 9 bytes",
    ),
    "NumPy": (task_error(MemoryError("Unable to allocate 3.00 GiB")), "Unable to allocate 3.00 GiB"),
    "Python": (task_error(MemoryError()), "MemoryError"),
    "a worker of Ray Train": (WorkerGroupError("x", {1: task_error(torch.OutOfMemoryError(CUDA))}), CUDA),
    "Ray's monitor": (KilledForMemoryError("Task was killed due to the node running low on memory."), "host memory"),
    "Ray's monitor, a worker of Train": (WorkerGroupError("x", {0: KilledForMemoryError("killed")}), "host memory"),
    "Ray's monitor, in a cause": (chained(ValueError("x"), KilledForMemoryError("killed")), "host memory"),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_memory_that_runs_out_is_one_message_with_the_keys_that_lower_it(name: str) -> None:
    raised, expected = OUT_OF_MEMORY[name]
    with pytest.raises(OutOfMemoryError) as caught, unwrapped("gallery shard 2 of 4, searching"):
        raise raised
    message = str(caught.value)
    assert message.startswith("gallery shard 2 of 4, searching: out of ")
    assert expected in message
    assert "\n" not in message
    for key in (
        "training.micro_batch",
        "evaluation.embed.batch_size",
        "rows_per_part",
        "evaluation.gallery.block_rows",
    ):
        assert key in message


DEATHS: dict[str, tuple[Exception, str]] = {
    "a worker": (WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly"),
    "an actor": (ActorDiedError(), "ActorDiedError: The actor died unexpectedly before finishing this task."),
    "an actor that is away": (ActorUnavailableError("Socket closed", b"\0" * 16), "Socket closed"),
    "a node": (NodeDiedError("The node 12ab died."), "NodeDiedError: The node 12ab died."),
    "a worker of Ray Train": (WorkerGroupError("x", {0: ActorDiedError()}), "ActorDiedError"),
    "a controller of Ray Train": (ControllerError(ActorDiedError()), "ActorDiedError"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_is_one_message_with_the_work_and_the_reason(name: str) -> None:
    raised, expected = DEATHS[name]
    with pytest.raises(ProcessDiedError) as caught, unwrapped("the work"):
        raise raised
    assert str(caught.value).startswith("the work: a process died each time")
    assert expected in str(caught.value)
    assert "scaling.max_failures" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_users_error_wins_and_an_unexpected_one_stays() -> None:
    inside = ImageError("images/3.png cannot be read")
    raised = WorkerGroupError("x", {0: ActorDiedError(), 1: task_error(inside)})
    with pytest.raises(ImageError) as caught, unwrapped("the work"):
        raise raised
    assert caught.value is inside
    unexpected = task_error(KeyError("x"))
    with pytest.raises(KeyError) as kept, unwrapped("the work"):
        raise unexpected
    assert kept.value is unexpected
    assert translated(None) is None


def test_what_no_restart_can_mend_ends_a_training_at_once() -> None:
    for error, kind in ((ImageError("x"), ImageError), (torch.OutOfMemoryError(CUDA), OutOfMemoryError)):
        with pytest.raises(kind):
            StopOnFinalError().after_exception(None, {0: ActorDiedError(), 1: task_error(error)})
    for lost in (ActorDiedError(), KilledForMemoryError("killed"), task_error(KeyError("x"))):
        assert final_error(lost) is None
        StopOnFinalError().after_exception(None, {0: lost})


class RunningState:
    """As Ray Train's."""


class ReschedulingState:
    """As Ray Train's: the workers are to be started again."""

    def __init__(self, error: Exception) -> None:
        self.training_failed_error = ControllerError(error)


def test_workers_that_never_start_are_started_a_bounded_number_of_times() -> None:
    died = chained(WorkerGroupStartupFailedError("a worker died"), ActorDiedError())
    callback = StopOnFailedStarts(2)
    for state in (ReschedulingState(died), ReschedulingState(died), RunningState(), ReschedulingState(died)):
        callback.after_controller_state_update(None, state)
    for _ in range(5):  # what waits for resources waits on
        callback.after_controller_state_update(None, ReschedulingState(WorkerGroupStartupTimeoutError(2)))
    callback.after_controller_state_update(None, ReschedulingState(died))
    with pytest.raises(ProcessDiedError, match=r"^start of the training workers: a process died each time"):
        callback.after_controller_state_update(None, ReschedulingState(died))
    with pytest.raises(ProcessDiedError, match=r"^start of the training workers: of another kind$"):
        StopOnFailedStarts(0).after_controller_state_update(
            None, ReschedulingState(WorkerGroupStartupFailedError("of\nanother kind"))
        )


def test_the_bounds_of_an_actor_follow_max_failures() -> None:
    assert actor_options(3) == {"max_restarts": 3, "max_task_retries": -1}
    assert actor_options(0) == {"max_restarts": 0, "max_task_retries": 0}
    assert actor_options(-1)["max_restarts"] == 100, "nothing is tried for ever"


def gallery_that(action: Any) -> Part:
    """A gallery whose shards do something when they load their part."""

    class Embeddings:
        def rows(self, *_: Any) -> None:
            action()

    return Part(Embeddings(), np.arange(6), np.arange(6), None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_dies_each_time_ends_the_search(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def die() -> None:
        with log.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessDiedError, match=r"^gallery shard 1 of 1, loading its part: a process died each time"):
        GalleryPool(gallery_that(die), nodes.ExactGallery(shards=1), use_gpu=False, max_failures=2)
    assert log.read_text() == "xxx"


@pytest.mark.usefixtures("ray_session")
def test_a_shard_out_of_memory_is_not_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run_out() -> None:
        with log.open("a") as file:
            file.write("x")
        raise MemoryError("Unable to allocate 3.00 GiB for an array")

    message = r"^gallery shard 1 of 1, loading its part: out of memory: Unable to allocate 3.00 GiB for an array\. To"
    with pytest.raises(OutOfMemoryError, match=message):
        GalleryPool(gallery_that(run_out), nodes.ExactGallery(shards=1), use_gpu=False)
    assert log.read_text() == "x"


@pytest.mark.usefixtures("ray_session")
def test_the_users_error_of_a_shard_is_raised_as_it_is() -> None:
    def refuse() -> None:
        raise EmbeddingError("row 3 has NaN")

    with pytest.raises(EmbeddingError, match=r"^row 3 has NaN$"):
        GalleryPool(gallery_that(refuse), nodes.ExactGallery(shards=1), use_gpu=False)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["tasks", "actors"])
def test_a_block_that_kills_its_process_each_time_ends_the_dataset(kind: str, tmp_path: Path) -> None:
    """As an image that crashes its decoder, or a part that crashes its network."""
    log = tmp_path / "log"

    def die(block: dict[str, Any]) -> dict[str, Any]:
        with log.open("a") as file:
            file.write("x")
        os._exit(7)

    class Die:
        def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
            return die(block)

    configure(1)
    dataset = ray.data.range(1, override_num_blocks=1)
    options: dict[str, Any] = {"compute": ActorPoolStrategy(size=1)} if kind == "actors" else {}
    dataset = map_batches(dataset, Die if kind == "actors" else die, 2, batch_size=None, num_cpus=1, **options)
    with pytest.raises(ProcessDiedError), unwrapped():
        list(dataset.iter_batches(batch_size=None, prefetch_batches=0))
    assert log.read_text() == "xxx"


def test_the_monitor_of_a_training_that_fails_is_ended(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray: what is started, asked and ended is recorded."""
    ended: list[Any] = []
    started = MagicMock()

    class FailingTrainer:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            raise ValueError("the controller failed")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ActorDiedError

    monkeypatch.setattr(trainer, "TorchTrainer", FailingTrainer)
    monkeypatch.setattr(trainer, "Monitor", started)
    for name, fake in (("put", lambda value: value), ("kill", ended.append), ("get", unreachable)):
        monkeypatch.setattr(ray, name, fake)
    config = validate(TrainConfig, train_config(small_table, tmp_path), "test")
    table, run = build.table(config.data, config.run.storage), RunDirectory(config.run.storage, config.run.name)
    with pytest.raises(ValueError, match="the controller failed"):
        trainer.fit(config, table, run)
    assert ended == [started.options.return_value.remote.return_value]
