"""Jobs over HTTP to a head that wants a token: what is uploaded, who may submit, what they log, how they go on."""

from __future__ import annotations

import collections
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.fs
import pytest
import requests
import yaml
from helpers import kill_marked
from pyarrow import parquet
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from oml_ray.retrieval.store import Store

ROOT = Path(__file__).parents[2]
EXCLUDES = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())["excludes"]
MARK = "OML_RAY_TEST_JOBS"  # in the environment of the head and of all that it starts
EPOCHS = 10
SMALL = f"training.epochs={EPOCHS} scaling.num_workers=1 evaluation.gallery.shards=1"
TRAIN = f"jobs/train.py configs/train/figures_smoke.yaml --set {SMALL}"

# All that a job may write: no bars, no colours, nothing of Ray.
TRAINING = (
    r"before training: cmc\.1 [\d.]+|epoch \d+: (loss [\d.]+, \d+ images/s, [\d.]+ s|cmc\.1 [\d.]+)|"
    r"training on \d+ workers?, from step \d+|"
    r"(table|plan|run): .*|"
    r"epoch \d+/\d+, step \d+/\d+: loss [\d.]+(, \d+ images/s, .* left)?"
)
RESULTS = r"\d+ queries, \d+ gallery items|  \S+ +[\d.]+  \[[\d.]+, [\d.]+\](  before training [\d.]+)?"
WAITING = r"waiting for CPUs: .*|(embedding|searching|ranking): \d+/\d+ .*"


class Head:
    """A Ray head in a process group of its own, for the body of a `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        (folder / "token").write_text(self.token)
        dashboard, agent, client = free_ports(3)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **os.environ,
            MARK: str(folder),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # how long a stopped job has to end by itself, on a busy machine
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            self.environment.pop(name, None)
        ports = [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
                 f"--ray-client-server-port={client}", "--port=0"]  # fmt: skip
        with (folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=6", *ports,
                 "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", f"--object-store-memory={2**29}"],
                env=self.environment, start_new_session=True, cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Head:
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        kill_marked(MARK, str(self.folder))

    def _wait(self) -> None:
        """Wait until jobs can be submitted: the dashboard answers, and so does the agent behind it."""
        deadline = time.monotonic() + 120
        while True:
            try:
                self.client().list_jobs()
                return
            except (ConnectionError, RuntimeError, requests.RequestException):
                assert self.process.poll() is None, (self.folder / "head.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def client(self) -> JobSubmissionClient:
        """Someone who has the token."""
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    def submit(self, *entrypoint: str | Path) -> str:
        """What `ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python ...` does."""
        environment = {"working_dir": str(ROOT), "excludes": EXCLUDES}
        return self.client().submit_job(entrypoint=" ".join(["python", *map(str, entrypoint)]), runtime_env=environment)

    def end_of(self, *jobs: str) -> list[tuple[JobStatus, list[str]]]:
        """Wait for the end of jobs; return how they ended, and the lines that they wrote."""
        client = self.client()
        deadline = time.monotonic() + 300
        while not all(client.get_job_status(job).is_terminal() for job in jobs):
            assert time.monotonic() < deadline, [client.get_job_logs(job) for job in jobs]
            time.sleep(0.2)
        return [(client.get_job_status(job), written(client.get_job_logs(job))) for job in jobs]


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def written(log: str) -> list[str]:
    """The lines of a job's own, after those of Ray that introduce it."""
    lines = log.splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith("Running entrypoint for job ")]
    # What the raylet tells all drivers of the cluster cannot be turned off: on few cores, that many processes start.
    return [line for line in lines[start + 1 :] if "(raylet)" not in line]


def strange(lines: list[str], *patterns: str) -> list[str]:
    """The lines of a log that are none of the expected ones."""
    return [line for line in lines if not re.fullmatch("|".join((*patterns, WAITING)), line)]


def history(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's history that are whole."""
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True) if (run / "history.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray_") as folder:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would win over the address that is given
            patch.delenv(name, raising=False)
        with Head(Path(folder)) as started:
            yield started


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def trained(head: Head, storage: Path) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """A training job that is stopped after some epochs and submitted again: both logs, and the history between them."""
    run, command = storage / "figures_smoke", f"{TRAIN} run.storage={storage}"
    job = head.submit(command)
    while sum(row["kind"] == "validation" for row in history(run)) < 3:
        assert not head.client().get_job_status(job).is_terminal(), head.end_of(job)
        time.sleep(0.1)
    assert head.client().stop_job(job)
    ((status, first),) = head.end_of(job)
    assert status == JobStatus.STOPPED
    assert not (run / "metrics.json").exists()
    between = history(run)
    ((status, second),) = head.end_of(head.submit(command))
    assert status == JobStatus.SUCCEEDED, second
    return first, second, between


def test_no_data_is_uploaded(tmp_path: Path) -> None:
    """The package that Ray makes of a folder of code with 4 MB of data in all places."""
    code = ["jobs/train.py", "configs/train/mine.yaml", "oml_ray/losses/new.py", "mine.yml", "model.py"]
    data = ["df.csv", "images/1.jpg", "data/x.bin", "runs/a/config.yaml", "runs/a/checkpoints/x.safetensors",
            "oml_ray/weights.onnx", "oml_ray/data/images/1.PNG", "configs/train/df.tsv", "configs/store/part-0.parquet",
            "jobs/x.npz", "configs/train/train.tar.gz", "jobs/notes.ipynb", "tests/helpers.py"]  # fmt: skip
    generator = np.random.default_rng(0)
    for name in [*code, *data]:
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x = 1\n" if name in code else generator.bytes(2**18 + 2**16))
    package = tmp_path / "package.zip"
    excludes = [*get_runtime_env_default_excludes(), *EXCLUDES]
    create_package(str(tmp_path / "work"), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == set(code)
    assert package.stat().st_size < 4096


def test_all_code_and_configs_are_uploaded(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=EXCLUDES)
    with zipfile.ZipFile(package) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("oml_ray", "jobs", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "0" * 64])
def test_without_the_token_nothing_is_submitted(token: str | None, head: Head) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    before = len(head.client().list_jobs())
    submission = {"entrypoint": "python jobs/train.py configs/train/figures_smoke.yaml"}
    answer = requests.post(f"{head.address}/api/jobs/", json=submission, headers=headers, timeout=30)
    assert answer.status_code == (403 if token else 401)
    assert len(head.client().list_jobs()) == before
    if token:  # without one Ray's client looks for one itself
        with pytest.raises(AuthenticationError, match="Invalid authentication token"):
            JobSubmissionClient(head.address, headers=headers)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_training_goes_on_where_it_was(
    trained: tuple[list[str], list[str], list[dict[str, Any]]], storage: Path
) -> None:
    first, second, between = trained
    interrupted = "oml-ray: interrupted; the same command continues an unfinished run, a sweep with --resume."
    assert first[-1] == interrupted
    assert strange(first[:-1], TRAINING) == []
    assert strange(second, TRAINING, RESULTS, f"report: {storage}/figures_smoke/report.html") == []
    assert second[-1].startswith("report: ")

    rows = collections.Counter((row["kind"], row["epoch"]) for row in history(storage / "figures_smoke"))
    epochs = {(kind, epoch) for kind in ("train", "validation") for epoch in range(EPOCHS)}
    assert rows == collections.Counter(epochs | {("validation", -1)})
    done = max(row["epoch"] for row in between if row["kind"] == "train") + 1
    # Of the epochs that the history had, the last one's checkpoint may not have been written yet.
    start = next(filter(None, (re.match(r"epoch (\d+): loss", line) for line in second))).group(1)
    assert 2 <= done <= int(start)

    metrics = json.loads((storage / "figures_smoke" / "metrics.json").read_text())
    assert metrics["overall"]["cmc"]["1"]["value"] > 0.3  # 0.25 before training
    assert (storage / "figures_smoke" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("trained")
def test_jobs_from_a_checkpoint(head: Head, storage: Path) -> None:
    """Evaluate, embed and search at one time; and a sweep whose base came along, but whose storage is relative."""
    run, given = storage / "figures_smoke", f"--set run.storage={storage}"
    source, shards = f"source.checkpoint={run}/checkpoints/best", "evaluation.gallery.shards=1"
    queries = f"queries={storage}/_figures/images gallery={run} gallery_root={storage}/_figures"
    jobs = [
        head.submit(f"jobs/evaluate.py configs/evaluate/figures.yaml {given} {source} {shards}"),
        head.submit(f"jobs/embed.py configs/embed/figures.yaml {given} {source}"),
        head.submit(f"jobs/search.py configs/search/figures.yaml {given} {source} {shards} {queries}"),
        head.submit("jobs/sweep.py configs/sweep/margins_smoke.yaml --set base.extractor.weights=w.pth"),
    ]
    ends = head.end_of(*jobs)
    assert [status for status, _ in ends] == [*[JobStatus.SUCCEEDED] * 3, JobStatus.FAILED], ends
    evaluated, embedded, searched, refused = (lines for _, lines in ends)

    assert strange(evaluated, RESULTS, f"report: {storage}/figures_evaluation/report.html") == []
    assert evaluated[-1].startswith("report: ")
    of_training, of_job = (
        json.loads((folder / "metrics.json").read_text())["overall"] for folder in (run, storage / "figures_evaluation")
    )
    assert of_job == of_training

    table = pd.read_csv(storage / "_figures" / "df.csv")
    rows, store = int((table["split"] == "validation").sum()), storage / "figures_embeddings" / "embeddings"
    assert strange(embedded, f"{rows} rows embedded in {store}") == []
    assert embedded[-1].endswith(str(store))
    assert Store(pyarrow.fs.LocalFileSystem(), str(store)).whole().num_rows == rows

    found = storage / "figures_search"
    next_to_open = [f"neighbors: {found}/neighbors.parquet; the queries' paths: {found}/queries.parquet",
                    f"report: {found}/report.html"]  # fmt: skip
    assert searched[-2:] == next_to_open
    assert strange(searched[:-2], RESULTS) == []
    assert parquet.read_metadata(found / "queries.parquet").num_rows == len(table)

    (message,) = refused
    assert message.startswith("oml-ray: In a Ray job relative paths lead into a copy of its working directory")
    assert "run.storage: runs, base.extractor.weights: w.pth." in message
    assert head.client().get_job_info(jobs[-1]).driver_exit_code == 2
