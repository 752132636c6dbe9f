"""Trackers: what MLflow (in a SQLite file) and W&B (offline) hold of a run, told and killed at any point."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import train_config
from mlflow import MlflowClient
from mlflow.entities import Run
from wandb.proto import wandb_internal_pb2

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.errors import ConfigError, OmlRayError, StorageError
from oml_ray.training.context import LocalContext
from oml_ray.training.loop import Loop
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking import mlflow_tracker, wandb_tracker
from oml_ray.training.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite file with MLflow's tables, which take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def node(uri: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"name": "mlflow", "uri": uri, "experiment": request.node.name}


def config_of(table: Path, folder: Path, node: dict[str, Any], **nodes: Any) -> TrainConfig:
    return validate(TrainConfig, train_config(table, folder, tracking=[node], **nodes), "test")


def built(config: TrainConfig) -> Loop:
    found = build.table(config.data, config.run.storage)
    stream = build.local_stream(config, found)
    run = RunDirectory(config.run.storage, config.run.name)
    return build.loop(config, found, stream.plan, LocalContext(stream), run)


def loop(table: Path, folder: Path, node: dict[str, Any], stop_after: int | None = None, **nodes: Any) -> Loop:
    made = built(config_of(table, folder, node, **nodes))
    if stop_after is not None:
        tell = made.context.progress

        def stop(row: dict[str, Any]) -> None:
            tell(row)
            if row["step"] == stop_after:
                raise KeyboardInterrupt  # as good as killed: nothing is closed

        made.context.progress = stop  # type: ignore[method-assign]
    return made


def recorded(node: dict[str, Any], run: Path) -> Run:
    """MLflow's only run of ours."""
    client = MlflowClient(node["uri"])
    experiment = client.get_experiment_by_name(node["experiment"])
    found = client.search_runs([experiment.experiment_id])
    ours = [each for each in found if each.data.tags["oml_ray.run"] == str(run)]
    assert len(ours) == 1
    return ours[0]


def curve(node: dict[str, Any], run: Path, name: str) -> list[tuple[int, float]]:
    """What MLflow holds of a curve, in the order of its steps."""
    points = MlflowClient(node["uri"]).get_metric_history(recorded(node, run).info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_a_run_is_recorded_as_its_history_tells_it(small_table: Path, tmp_path: Path, node: dict[str, Any]) -> None:
    trained = loop(small_table, tmp_path, node, training={"epochs": 2, "log_every": 2})
    trained.train()
    rows = [row for row in trained.records.history.rows if row["kind"] == "validation"]
    assert curve(node, tmp_path / "run", "validation/cmc.1") == [(row["step"], row["cmc.1"]) for row in rows]
    assert [step for step, _ in curve(node, tmp_path / "run", "train/loss")] == [2, 4, 6, 8]
    run = recorded(node, tmp_path / "run")
    assert run.info.status == "RUNNING", "it is not evaluated yet"
    assert run.info.run_name == "run"
    assert run.data.tags["oml_ray.run"] == str(tmp_path / "run")
    assert run.data.params["seed"] == "7"
    assert run.data.params["criterion.miner.name"] == "hard"


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_a_killed_run_continues_its_record_and_doubles_nothing(
    small_table: Path, tmp_path: Path, node: dict[str, Any], stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "SEND_EVERY_S", 0.0)  # so that something is sent beyond the checkpoint
    nodes = {"training": {"epochs": 2, "log_every": 1}}
    loop(small_table, tmp_path / "unbroken", node, **nodes).train()
    with pytest.raises(KeyboardInterrupt):
        loop(small_table, tmp_path / "killed", node, stop_after, **nodes).train()
    loop(small_table, tmp_path / "killed", node, **nodes).train()
    for name in ("train/loss", "train/lr", "validation/cmc.1", "validation/map.2"):
        expected, found = (curve(node, tmp_path / kind / "run", name) for kind in ("unbroken", "killed"))
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-9)


class DownError(Exception):
    """A server that does not answer."""


@pytest.fixture
def tracker(tmp_path: Path, node: dict[str, Any]) -> MlflowTracker:
    return opened(tmp_path, node)


def opened(folder: Path, node: dict[str, Any]) -> MlflowTracker:
    return MlflowTracker(RunDirectory(str(folder), "run"), {"seed": 1}, "title", node["uri"], node["experiment"])


def down(patch: pytest.MonkeyPatch, *methods: str) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise DownError("no route to http://me:secret@host")

    for method in methods:
        patch.setattr(MlflowClient, method, ask)


def test_what_a_server_misses_is_kept_in_the_run_and_sent_later(
    tracker: MlflowTracker, tmp_path: Path, node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.points({"train/loss": 3.0}, 1)
    tracker.settle()
    with monkeypatch.context() as patch:
        down(patch, "log_batch")
        tracker.points({"train/loss": 2.0}, 2)
        tracker.settle()
        tracker.points({"train/loss": 1.0}, 3)
        tracker.close()
    assert curve(node, tmp_path / "run", "train/loss") == [(1, 3.0)]
    again = opened(tmp_path, node)
    again.points({"train/loss": 1.0}, 3)
    again.points({"train/loss": 0.5}, 4)
    again.close()
    assert curve(node, tmp_path / "run", "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert not (tmp_path / "run" / mlflow_tracker.UNSENT).exists()


def test_results_that_cannot_be_recorded_are_an_error(
    tracker: MlflowTracker, tmp_path: Path, node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "meta.json").write_text("{}")
    given: tuple[Any, ...] = ({"evaluation/cmc.1": 0.5}, {"report.html": "<p>"}, tmp_path / "checkpoint")
    with monkeypatch.context() as patch:
        down(patch, "log_batch")
        with pytest.raises(
            StorageError, match=r"MLflow at sqlite.* does not take .* no route to http://\*\*\*@host\..*same command"
        ):
            tracker.finish(*given)
    opened(tmp_path, node).finish(*given)
    assert curve(node, tmp_path / "run", "evaluation/cmc.1") == [(0, 0.5)]
    client = MlflowClient(node["uri"])
    run = recorded(node, tmp_path / "run")
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "checkpoint"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "checkpoint")] == ["checkpoint/meta.json"]


def test_a_server_that_is_down_all_the_time_does_not_end_a_training(
    small_table: Path, tmp_path: Path, node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {"training": {"epochs": 2, "log_every": 1}}
    with monkeypatch.context() as patch:
        down(patch, "get_experiment_by_name")
        loop(small_table, tmp_path, node, **nodes).train()
    (finishing,) = build.trackers(config_of(small_table, tmp_path, node, **nodes), RunDirectory(str(tmp_path), "run"))
    finishing.finish({}, {}, tmp_path / "run" / "checkpoints")
    assert [step for step, _ in curve(node, tmp_path / "run", "train/loss")] == list(range(1, 9))
    assert [step for step, _ in curve(node, tmp_path / "run", "validation/cmc.1")] == [0, 4, 8]


def test_a_run_that_was_deleted_there_is_recorded_anew(tmp_path: Path, node: dict[str, Any]) -> None:
    tracker = opened(tmp_path, node)
    tracker.points({"train/loss": 1.0}, 1)
    tracker.close()
    MlflowClient(node["uri"]).delete_run(recorded(node, tmp_path / "run").info.run_id)
    again = opened(tmp_path, node)
    again.points({"train/loss": 2.0}, 2)
    again.close()
    assert curve(node, tmp_path / "run", "train/loss") == [(2, 2.0)]


def test_what_was_validated_but_told_nobody_is_told_by_the_next_process(
    small_table: Path, tmp_path: Path, node: dict[str, Any]
) -> None:
    nodes = {"training": {"epochs": 2}}
    built(config_of(small_table, tmp_path, node, **nodes).model_copy(update={"tracking": []})).train()
    later = loop(small_table, tmp_path, node, **nodes)
    later.train()
    scores = [(row["step"], row["cmc.1"]) for row in later.records.history.rows if row["kind"] == "validation"]
    assert curve(node, tmp_path / "run", "validation/cmc.1") == scores


def test_runs_that_begin_at_once_share_an_experiment(tmp_path: Path, node: dict[str, Any]) -> None:
    trackers = [opened(tmp_path / name, node) for name in "abcd"]
    for tracker in trackers:
        tracker.points({"train/loss": 1.0}, 1)
    for tracker in trackers:
        tracker.close()
    for name in "abcd":
        assert curve(node, tmp_path / name / "run", "train/loss") == [(1, 1.0)]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "mlflow"}, "MLFLOW_TRACKING_URI is not set"),
        ({"name": "mlflow", "uri": "sqlite:///mlflow.db"}, "four slashes"),
        ({"name": "mlflow", "uri": "mlruns"}, "four slashes"),
        ({"name": "mlflow", "uri": "http://me:secret@host"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"name": "mlflow", "uri": "http://[::1"}, "no URI"),
        ({"name": "mlflow", "uri": "postgresql://host/db"}, "four slashes"),
        ({"name": "mlflow", "uri": "http://127.0.0.1:9"}, "does not take the records"),
        ({"name": "clearml"}, "tracking"),
    ],
    indirect=False,
)
def test_places_that_do_not_exist_are_found_early(
    node: dict[str, Any], message: str, small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(OmlRayError, match=message) as raised:
        build.check_tracking(validate(TrainConfig, train_config(small_table, tmp_path, tracking=[node]), "test"))
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_each_tracker_is_there_once(small_table: Path, tmp_path: Path) -> None:
    twice = [{"name": "mlflow", "uri": f"http://{host}"} for host in ("a", "b")]
    with pytest.raises(ConfigError, match="tracking: a run is recorded once by each"):
        validate(TrainConfig, train_config(small_table, tmp_path, tracking=twice), "test")


def test_wandb_keeps_records_in_the_run_when_it_is_offline(
    small_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    node = {"name": "wandb", "project": "p"}
    trained = loop(small_table, tmp_path, node, training={"epochs": 2, "log_every": 2})
    trained.train()
    config = validate(TrainConfig, train_config(small_table, tmp_path, tracking=[node]), "test")
    build.check_tracking(config)
    (finishing,) = build.trackers(config, trained.run)
    finishing.finish({"evaluation/cmc.1": 0.5}, {"report.html": "<p>"}, tmp_path / "run" / "checkpoints")
    records = wandb_records(tmp_path / "run" / "wandb")
    assert {record["id"] for record in records["run"]} == {(tmp_path / "run" / "tracking_id").read_text()}
    rows = [row for row in trained.records.history.rows if row["kind"] == "validation"]
    scores = [
        (row["validation/step"], row["validation/cmc.1"]) for row in records["history"] if "validation/cmc.1" in row
    ]
    assert scores == [(row["step"], row["cmc.1"]) for row in rows]
    assert [row["train/step"] for row in records["history"] if "train/loss" in row] == [2, 4, 6, 8]
    assert 0.5 in [row.get("evaluation/cmc.1") for row in records["summary"]]
    assert {record["type"] for record in records["artifact"]} == {"results", "checkpoint"}


class SlowWandb:
    """In place of the package: a server that does not answer until it is told to."""

    offline = False

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.summary: dict[str, Any] = {}
        self.points: list[dict[str, float]] = []
        self.ended = False

    def Settings(self, **_: Any) -> None:  # noqa: N802
        """As wandb.Settings."""

    def init(self, **_: Any) -> SlowWandb:
        self.answers.wait()
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        """As of a run."""

    def log(self, values: dict[str, float]) -> None:
        self.points.append(values)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def slow_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowWandb]:
    fake = SlowWandb()
    monkeypatch.setattr(wandb_tracker, "_package", lambda: fake)
    monkeypatch.setattr(wandb_tracker, "SETTLE_S", 0.01)
    monkeypatch.setattr(wandb_tracker, "FINISH_S", 0.01)
    yield fake
    fake.answers.set()


def test_a_step_does_not_wait_for_wandb(
    slow_wandb: SlowWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the server does not answer, points are taken up to a bound, the rest is left out with one warning."""
    tracker = wandb_tracker.WandbTracker(RunDirectory(str(tmp_path), "run"), {}, "title", "project", None)
    limit = wandb_tracker.MAX_PENDING
    for step in range(limit + 50):
        tracker.points({"train/loss": 0.5}, step)
    tracker.settle()
    assert [record.getMessage() for record in caplog.records] == [
        f"tracking: W&B is too slow: points are left out from step {limit} on"
    ]
    slow_wandb.answers.set()
    assert tracker._sent(60)
    tracker.points({"train/loss": 0.5}, limit + 50)
    assert tracker._sent(60)
    assert [point["train/step"] for point in slow_wandb.points] == [*range(limit), limit + 50]
    tracker.close()
    assert slow_wandb.ended


def test_results_that_wandb_does_not_take_in_time_are_an_error(slow_wandb: SlowWandb, tmp_path: Path) -> None:
    tracker = wandb_tracker.WandbTracker(RunDirectory(str(tmp_path), "run"), {}, "title", "project", None)
    tracker.points({"train/loss": 0.5}, 0)
    with pytest.raises(StorageError, match=r"tracking: W&B .* it took no points for"):
        tracker.finish({}, {}, tmp_path)
    tracker.close()
    assert not slow_wandb.ended


def wandb_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the files of offline runs hold, by the kind of the record."""
    found: dict[str, list[dict[str, Any]]] = {"run": [], "history": [], "summary": [], "artifact": []}
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found[kind].append({"id": record.run.run_id})
            elif kind == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found[kind].append({name: json.loads(value) for name, value in items.items()})
            elif kind == "summary":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update}
                found[kind].append({name: json.loads(value) for name, value in items.items()})
            elif kind == "artifact":
                found[kind].append({"type": record.artifact.type})
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB, of parts with a header of 7 bytes."""
    start, record = 7, b""  # after W&B's own header
    while start + 7 <= len(data):
        if 32768 - start % 32768 < 7:
            start += 32768 - start % 32768
            continue
        length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
