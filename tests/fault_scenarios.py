"""Jobs that faults disturb: their configs, their results, and how a fault meets them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import yaml
from failing_storage import FailingStorage
from helpers import train_config
from injection import Injection
from processes import Job
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from oml_ray.retrieval.store import Store, embeddings_of


@dataclass(frozen=True)
class Workload:
    """A job, what to compare of its result, and where faults meet it."""

    name: str
    verb: str
    config: Callable[[Path, Path], dict[str, Any]]
    result: Callable[[Path], Any]
    processes: tuple[str, ...]
    """Titles of its processes that may die."""
    files: tuple[str, ...]
    """What may be cut short while nothing runs."""
    computing: tuple[str, ...]
    """Functions that need memory: "module:function"."""


def train(table: Path, folder: Path) -> dict[str, Any]:
    """A few seconds of steps, with checkpoints in the middle of epochs."""
    return train_config(
        table,
        folder,
        training={"epochs": 12, "precision": "fp64"},
        checkpoint={"every_steps": 3},
        validation={"every": 6},
        scaling={"num_workers": 2},
    )


def train_async(table: Path, folder: Path) -> dict[str, Any]:
    """The same, whose checkpoints are validated beside the training."""
    config = train(table, folder)
    config["validation"] = {"every": 4, "mode": "async", "timeout_s": 120}
    return config


def embed(table: Path, folder: Path) -> dict[str, Any]:
    """Parts of two rows."""
    return {
        "run": {"name": "run", "storage": str(folder)},
        "data": {"table": str(table), "split": "all"},
        "source": {"extractor": {"name": "timm", "model": "test_vit"}, "size": 32},
        "evaluation": {"embed": {"rows_per_part": 2, "actors": 2}},
    }


def evaluate(table: Path, folder: Path) -> dict[str, Any]:
    """Two shards, and metrics that need all ranks."""
    config = embed(table, folder)
    del config["data"]["split"]
    config["evaluation"] |= {
        "gallery": {"shards": 2, "block_rows": 16},
        "metrics": {"cmc": [1, 5], "map_r": True, "fnmr_at_fmr": [0.1], "bootstrap": {"samples": 10}},
        "rerank": [{"name": "query_expansion", "n": 2}, {"name": "k_reciprocal", "k1": 4, "k2": 2}],
    }
    return config


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint."""
    name = (run / "checkpoints" / "last").read_text()
    found = load_file(run / "checkpoints" / name / "extractor.safetensors")
    return {name: tensor.numpy() for name, tensor in found.items()}


def rows_of(run: Path) -> dict[int, bytes]:
    """The embedding of each row, each once."""
    store = Store(pyarrow.fs.LocalFileSystem(), str(run / "embeddings"))
    rows: dict[int, bytes] = {}
    for part in store.parts(store.whole(), ["id", "embedding"]):
        for row, embedding in zip(part["id"].to_pylist(), embeddings_of(part), strict=True):
            assert row not in rows, f"row {row} is there twice"
            rows[row] = np.asarray(embedding).tobytes()
    return rows


def metrics_of(run: Path) -> Any:
    """All but timings."""
    document = json.loads((run / "metrics.json").read_text())
    return {key: document[key] for key in ("overall", "categories", "counts", "reranking")}


STEP = "oml_ray.training.updates:Updates.apply"
VALIDATION = "oml_ray.distributed.validation:_scores"
NEARER = "oml_ray.retrieval.ranks:nearer"
FORWARD = "oml_ray.learning.extractors:Extractor.forward"
TRAINING = (("RayTrainWorker", "load_training"), ("checkpoints/step_*/*",), (FORWARD, STEP))
EMBEDDED = ("embeddings/part-*.parquet",)
TRAIN = Workload("train", "train", train, weights_of, *TRAINING)
TRAIN_ASYNC = Workload("async", "train", train_async, weights_of, *TRAINING)
EMBED = Workload("embed", "embed", embed, rows_of, ("_Embedder", "load_part"), EMBEDDED, (FORWARD,))
EVALUATE = Workload(
    "evaluate", "evaluate", evaluate, metrics_of, ("GalleryShard", "_Embedder"), EMBEDDED, (FORWARD, NEARER)
)
WORKLOADS = (TRAIN, EMBED, EVALUATE)
End = tuple[int, str]
"""Exit status, and what was written to stderr."""
UNEXPECTED, USER_ERROR = 1, 2
DONE: End = (0, "")


@dataclass(frozen=True)
class Scenario:
    """A job that is disturbed once, and what it is disturbed with."""

    workload: Workload
    config: Path
    run: Path
    generator: random.Random
    seconds: float
    """How long it takes undisturbed."""
    storage: FailingStorage
    nodes: Callable[[], Cluster]
    """A head of its own Ray, started where it is asked for."""

    def injected(self, target: str, failure: str, *, first: int, times: int) -> tuple[Injection, End]:
        """Run the job with a function that fails at some calls, to its end."""
        injection = Injection(self.run.parent, target, failure, first=first, times=times)
        with Job(self.workload.verb, self.config, injection.environment) as job:
            return injection, job.end()

    @contextmanager
    def met(self, environment: Mapping[str, str] | None = None) -> Iterator[Job]:
        """The job, started, at a random moment of it; what is left of it is gone after the body of the `with`."""
        with Job(self.workload.verb, self.config, environment) as job:
            moment = time.monotonic() + self.generator.uniform(0.2, 0.95) * self.seconds
            while time.monotonic() < moment and job.process.poll() is None:
                time.sleep(0.02)
            yield job

    def again(self) -> End:
        """Start the same job, and wait for its end."""
        with Job(self.workload.verb, self.config) as job:
            return job.end()


def write(workload: Workload, table: Path, folder: Path) -> Path:
    """Write the config of a job."""
    path = folder / f"{workload.name}.yaml"
    path.write_text(yaml.safe_dump(workload.config(table, folder)))
    return path


def is_one_message(end: End) -> None:
    status, errors = end
    assert (status, errors[:9], errors.count("\n")) == (USER_ERROR, "oml-ray: ", 1), end


def has_only_retried(end: End, run: Path) -> None:
    """Done, with a line for each retry of the storage."""
    status, errors = end
    assert status == 0, errors
    for line in errors.splitlines():
        assert "Input/output error" in line, errors
        assert str(run) in line, errors


def is_one_failure(end: End) -> None:
    """One message, of a failure that the user cannot mend as well."""
    status, errors = end
    assert status in (UNEXPECTED, USER_ERROR), end
    assert errors.startswith("oml-ray: "), end
    assert "Traceback" not in errors, end


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict) and all(isinstance(value, np.ndarray) for value in expected.values()):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10)
    else:
        assert found == expected
