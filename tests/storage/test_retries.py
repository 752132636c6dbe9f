"""Transient errors of storage are retried and counted; those of the user are not."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky_filesystem import FlakyHandler, every, first, input_output_error, throttled
from helpers import train_config, write_images
from pyarrow import fs
from safetensors import SafetensorError

from oml_ray import build
from oml_ray.config import EmbedConfig, EvaluateConfig, SearchConfig, TrainConfig, validate
from oml_ray.data import filesystem as filesystems
from oml_ray.data.filesystem import exists, list_files, read_bytes, read_if_exists
from oml_ray.data.images import EvaluationLoader, ImageReader
from oml_ray.data.queries import read_queries
from oml_ray.data.table import read_table
from oml_ray.data.transforms import Resize
from oml_ray.distributed import runs
from oml_ray.errors import ImageError, OmlRayError, StorageError, StorageUnavailableError
from oml_ray.retrieval import index_file
from oml_ray.retrieval.neighbors import Neighbors
from oml_ray.retrieval.neighbors_file import neighbors_writer, read_neighbors
from oml_ray.retrieval.store import Manifest, Store
from oml_ray.retrieval.user_embeddings import UserEmbeddings
from oml_ray.storage import retries
from oml_ray.storage.retries import is_transient, retried
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import Checkpoint, Position
from oml_ray.training.run_directory import RunDirectory

RETRIES = 4


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(retries, "sleep", waited.append)
    for name in retries.VARIABLES:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    retries.configure(RETRIES, 1.0)
    return waited


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlakyHandler:
    """What is behind s3:// URIs."""
    (tmp_path / "remote" / "bucket").mkdir(parents=True)
    handler = FlakyHandler(tmp_path / "remote")
    remote = fs.PyFileSystem(handler)
    monkeypatch.setattr(filesystems, "_filesystem", lambda root: (remote, root.removeprefix("s3://").rstrip("/")))
    return handler


class AwsError(OSError):
    """As pyarrow raises it, without an errno."""


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, os.strerror(number))
            for number in (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET)
        ),
        *(ConnectionRefusedError(), ConnectionResetError("peer"), TimeoutError(), BrokenPipeError(errno.EPIPE, "pipe")),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        *(
            AwsError(
                f"When reading information for key 'x' in bucket 'b': AWS Error {reason} during HeadObject operation"
            )
            for reason in (
                *("SLOW_DOWN", "NETWORK_CONNECTION", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "THROTTLING"),
                *("REQUEST_TIMEOUT", "UNKNOWN (HTTP status 503)", "UNKNOWN (HTTP status 429)"),
            )
        ),
        OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"),
        OSError("google::cloud::Status(DEADLINE_EXCEEDED: timeout)"),
        OSError("Azure Error: [ServerBusy] 503 The server is busy."),
        pa.ArrowException("curlCode: 28, Timeout was reached: operation timed out"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
    ],
)
def test_transient_errors(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(
            FileNotFoundError(errno.ENOENT, "x"),
            PermissionError(errno.EACCES, "x"),
            IsADirectoryError(errno.EISDIR, "x"),
        ),
        *(
            OSError(number, os.strerror(number))
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
        ),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        AwsError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        AwsError("AWS Error NO_SUCH_BUCKET during PutObject operation"),
        AwsError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation"),
        AwsError("read 500 bytes of 503"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        pa.ArrowInvalid("Parquet magic bytes not found in footer."),
        ValueError("SLOW_DOWN"),
        StorageUnavailableError("timed out"),
    ],
)
def test_errors_of_the_user(error: Exception) -> None:
    assert not is_transient(error)


def test_the_waits_grow_and_differ(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    fault = first(RETRIES, input_output_error)
    numbers = iter(range(1, 10))

    def operation() -> str:
        if (error := fault("", next(numbers))) is not None:
            raise error
        return "done"

    with caplog.at_level(logging.WARNING, logger="oml_ray"):
        assert retried(operation, "s3://KEY:SECRET@bucket/x") == "done"
    assert len(waits) == RETRIES
    for attempt, wait in enumerate(waits):
        assert 0.5 * 2**attempt <= wait <= 2**attempt
    assert [record.levelname for record in caplog.records] == ["WARNING"] * RETRIES
    assert "s3://***@bucket/x" in caplog.text
    assert f"retry {RETRIES} of {RETRIES}" in caplog.text


def test_after_the_last_try_the_storage_is_named(waits: list[float]) -> None:
    calls: list[int] = []

    def operation() -> None:
        calls.append(1)
        raise throttled()

    with pytest.raises(
        StorageUnavailableError, match=r"s3://bucket/x failed at all 5 tries.* SLOW_DOWN .*storage.retries \(now 4\)"
    ):
        retried(operation, "s3://bucket/x")
    assert len(calls) == RETRIES + 1
    retries.configure(0, 1.0)
    waits.clear()
    with pytest.raises(StorageUnavailableError, match="failed at the only try"):
        retried(operation, "s3://bucket/x")
    assert (len(calls), waits) == (RETRIES + 2, [])


def test_an_error_of_the_user_is_raised_at_once(waits: list[float]) -> None:
    calls: list[int] = []

    def operation() -> None:
        calls.append(1)
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        retried(operation, "x")
    assert (len(calls), waits) == (1, [])


# What a run does with storage, each with what it must give.
Case = Callable[[Path], Any]


def read_a_file(folder: Path) -> Any:
    return read_bytes("s3://bucket/data/images/0_0.png") == (folder / "data/images/0_0.png").read_bytes()


def look_at_files(folder: Path) -> Any:
    names = sorted(path.name for path in (folder / "data/images").iterdir())
    return (
        sorted(list_files("s3://bucket/data/images")) == names,
        exists("s3://bucket/data"),
        exists("s3://bucket/absent"),
        read_if_exists("s3://bucket/absent"),
    ) == (True, True, False, None)


def read_a_table(folder: Path) -> Any:
    return read_table("s3://bucket/data/df.csv").labels.tolist() == read_table(folder / "data/df.csv").labels.tolist()


def list_queries(folder: Path) -> Any:
    return read_queries("s3://bucket/data/images")[0].paths.to_pylist() == sorted(os.listdir(folder / "data/images"))


def write_and_read_a_store(folder: Path) -> Any:
    store = Store(*filesystems.resolve("s3://bucket/store"))
    manifest = Manifest(3, 2, 4, "weights", {}, "table", "all")
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    for part in store.begin(manifest):
        rows = slice(2 * part, 2 * part + 2)
        store.write_part(part, {"id": np.arange(3)[rows]}, vectors[rows], {})
    ids = [part["id"].to_pylist() for part in store.parts(store.whole(), ["id"], np.array([0, 2]))]
    return (ids, store.bad_images(manifest)) == ([[0, 1], [2]], {})


def write_and_read_neighbors(folder: Path) -> Any:
    neighbors = Neighbors(np.array([[7, -1]]), np.array([[0.5, np.inf]], dtype=np.float32), np.array([1]))
    filesystem, path = filesystems.resolve("s3://bucket/neighbors.parquet")
    with neighbors_writer(filesystem, path, k=2) as write:
        write(np.array([3]), neighbors)
    return read_neighbors(filesystem, path)[1].ids.tolist() == [[7, -1]]


def read_embeddings(folder: Path) -> Any:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [3.0, 4.0]]}), folder / "a.parquet")
    np.save(folder / "b.npy", np.eye(2, dtype=np.float32))
    rows = [
        block[1].tolist()
        for name in ("a.parquet", "b.npy")
        for block in UserEmbeddings(*filesystems.resolve(f"s3://bucket/{name}")).blocks(rows_per_block=1)
    ]
    return rows == [[[1, 2]], [[3, 4]], [[1, 0]], [[0, 1]]]


def save_and_load_an_index(folder: Path) -> Any:
    filesystem, path = filesystems.resolve("s3://bucket/indexes/a")
    index_file.save(filesystem, path, {"by": 1}, lambda local: Path(local).write_bytes(b"index") and None)
    return index_file.load(filesystem, path, {"by": 1}, lambda local: Path(local).read_bytes()) == b"index"


def train_twice(folder: Path) -> Any:
    run = RunDirectory("s3://bucket/runs", "a")
    for step in (1, 2):
        state = {"w": __import__("torch").full((3,), step)}
        checkpoints.save(run, Checkpoint(state, {}, Position(0, 0, step), None, {}), is_best=True, keep=1)
    found = checkpoints.latest(run)
    run.remove("absent")
    return found and (found.position.global_step, run.names("checkpoints")) == (2, ["best", "last", "step_00000002"])


CASES = (
    *(read_a_file, look_at_files, read_a_table, list_queries, write_and_read_a_store, write_and_read_neighbors),
    *(read_embeddings, save_and_load_an_index, train_twice),
)


def prepare(flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("oml_ray.training.run_directory.tempfile.gettempdir", lambda: str(tmp_path))
    bucket = tmp_path / "remote" / "bucket"
    write_images(bucket / "data", labels=2, instances=3, validation=1)
    return bucket


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [2, 3])
def test_everything_survives_a_fault_at_every_kth_call(
    case: Case, k: int, flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    bucket = prepare(flaky, tmp_path, monkeypatch)
    flaky.fault = every(k, throttled)
    assert case(bucket) is True
    assert len(waits) == len(flaky.calls) // k, "each fault is retried once"
    assert waits or len(flaky.calls) < k


@pytest.mark.parametrize("case", CASES)
def test_storage_that_is_gone_ends_in_one_error_after_all_tries(
    case: Case, flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    bucket = prepare(flaky, tmp_path, monkeypatch)
    flaky.fault = every(1, throttled)
    with pytest.raises(StorageUnavailableError, match=f"failed at all {RETRIES + 1} tries"):
        case(bucket)
    assert len(waits) == RETRIES, "retries are not multiplied"
    assert len(flaky.calls) == RETRIES + 1


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_allowed_is_not_tried_again(
    case: Case, flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    bucket = prepare(flaky, tmp_path, monkeypatch)
    flaky.fault = every(1, lambda: PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(OmlRayError, match=r"(?i)permission denied") as error:
        case(bucket)
    assert not isinstance(error.value, StorageUnavailableError)
    assert "damaged" not in str(error.value)
    assert "not whole" not in str(error.value)
    assert (len(flaky.calls), waits) == (1, [])


def loader(table: str, on_bad_image: Any = "skip") -> EvaluationLoader:
    reader = ImageReader(read_table(table), max_pixels=10**6)
    return EvaluationLoader(reader, Resize(size=8), on_bad_image=on_bad_image)


def test_an_unavailable_storage_is_no_bad_image(
    flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = prepare(flaky, tmp_path, monkeypatch)
    load = loader("s3://bucket/data/df.csv")
    (bucket / "data/images/0_1.png").unlink()
    flaky.fault = first(2, throttled, of="open")
    batch = load.load(np.arange(4))
    assert (batch.ids.tolist(), batch.bad.tolist()) == ([0, 2, 3], [1]), "an absent file is one"
    flaky.fault = every(1, throttled)
    with pytest.raises(StorageUnavailableError) as error:
        load.load(np.arange(4))
    assert not isinstance(error.value, ImageError)


def test_local_reads_are_retried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    real, fault, numbers = open, first(2, input_output_error), iter(range(1, 10))

    def failing(*arguments: Any, **options: Any) -> Any:
        if (error := fault("", next(numbers))) is not None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(filesystems, "open", failing, raising=False)
    assert read_bytes(tmp_path / "a") == b"abc"
    assert len(waits) == 2


def test_a_run_is_not_taken_for_a_new_one_when_storage_fails(
    flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = prepare(flaky, tmp_path, monkeypatch)
    tree = train_config(bucket / "data/df.csv", tmp_path)
    tree["run"]["storage"] = "s3://bucket/runs"
    config = validate(TrainConfig, tree, "config")
    assert not runs.check_name(config)
    runs.open_run(config)
    flaky.fault = every(2, throttled)
    assert runs.check_name(config)
    flaky.fault = every(1, throttled)
    with pytest.raises(StorageUnavailableError):
        runs.check_name(config)


def test_the_config_sets_the_retries(tmp_path: Path) -> None:
    tree = {**train_config(tmp_path / "df.csv", tmp_path), "storage": {"retries": 2, "first_wait_s": 0.25}}
    for schema in (TrainConfig, EmbedConfig, EvaluateConfig, SearchConfig):
        assert "storage" in schema.model_fields
    runs.resolved(validate(TrainConfig, tree, "config"))
    assert retries.environment() == dict(zip(retries.VARIABLES, ("2", "0.25"), strict=True))
    with pytest.raises(StorageUnavailableError, match="all 3 tries"):
        retried(lambda: (_ for _ in ()).throw(throttled()), "x")
    del tree["storage"]
    runs.resolved(validate(TrainConfig, tree, "config"))
    assert retries.environment() == {}, "the defaults need no environment of their own"


def test_the_retries_may_change_when_a_run_is_continued(tmp_path: Path) -> None:
    table = write_images(tmp_path / "t", labels=2, instances=2, validation=1)
    tree = train_config(table, tmp_path)
    runs.open_run(validate(TrainConfig, tree, "config"))
    assert runs.check_name(validate(TrainConfig, {**tree, "storage": {"retries": 1}}, "config"))


def test_figures_are_generated_behind_a_uri(
    flaky: FlakyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        build.data, "write_figures", lambda folder: write_images(folder, labels=2, instances=2, validation=1)
    )
    flaky.fault = every(2, throttled)
    assert build.figures_table("s3://bucket/runs") == "s3://bucket/runs/_figures/df.csv"
    published = tmp_path / "remote/bucket/runs/_figures"
    assert {path.name for path in published.iterdir()} == {"df.csv", "images"}


def test_a_full_disk_is_a_storage_error_at_once(flaky: FlakyHandler, waits: list[float]) -> None:
    flaky.fault = lambda kind, number: OSError(errno.ENOSPC, "No space left on device") if kind == "write" else None
    store = Store(*filesystems.resolve("s3://bucket/store"))
    with pytest.raises(StorageError, match="No space left") as error:
        store.begin(Manifest(3, 2, 4, "weights", {}, "table", "all"))
    assert not isinstance(error.value, StorageUnavailableError)
    assert waits == []
