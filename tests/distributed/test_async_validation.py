"""Validation off the training path, through Ray: the rows and the best of inline; whatever fails in it ends it."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import train_config, write_images

from oml_ray.cli import main
from oml_ray.distributed import validation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]


def write(table: Path, folder: Path, **nodes: Any) -> str:
    nodes = {"scaling": {"num_workers": 2}, "training": {"epochs": 3, "precision": "fp64"}, **nodes}
    folder.mkdir(exist_ok=True)
    evaluation = {"metrics": {"cmc": [1, 2], "precision": [2], "map": [2]}, "gallery": {"shards": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(train_config(table, folder, evaluation=evaluation, **nodes)))
    return str(folder / "config.yaml")


def validations(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "validation"]


def test_the_same_rows_and_best_as_inline(small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = {}
    for mode in ("inline", "async"):
        assert main(["train", write(small_table, tmp_path / mode, validation={"mode": mode})]) == 0
        runs[mode] = tmp_path / mode / "run"
    assert capfd.readouterr().out.count("epoch 3: cmc.1 ") == 2
    for one, other in zip(validations(runs["async"]), validations(runs["inline"]), strict=True):
        assert {key: one[key] for key in ("epoch", "step")} == {key: other[key] for key in ("epoch", "step")}
        for name in (name for name in other if "." in name):
            assert one[name] == pytest.approx(other[name], abs=1e-9)
        # The actors embed in float32, the training in float64.
        assert one["spread"] == pytest.approx(other["spread"], abs=1e-6)
    best = {mode: (run / "checkpoints" / "best").read_text() for mode, run in runs.items()}
    assert best["async"] == best["inline"]
    assert not (runs["async"] / "validations").exists()
    kept = {path.name for path in (runs["async"] / "checkpoints").iterdir()}
    assert kept == {path.name for path in (runs["inline"] / "checkpoints").iterdir()}


def test_an_unreadable_image_ends_the_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = write_images(tmp_path, labels=8, instances=4, validation=3)
    (tmp_path / "images" / "6_1.png").write_bytes(b"no image")
    path = write(table, tmp_path / "runs", validation={"mode": "async"}, training={"epochs": 400})
    capfd.readouterr()
    assert main(["train", path]) == 2
    error = capfd.readouterr().err
    assert error.startswith("oml-ray: The validation of the checkpoint of step 0 failed: ")
    assert "6_1.png" in error
    assert error.count("\n") == 1


def raising(checkpoint: Any, **payload: Any) -> Any:
    """In place of the task: its search runs out of memory."""
    from oml_ray.distributed import validation

    def out_of_memory(*_: Any) -> None:
        raise MemoryError("Unable to allocate 3.00 GiB for an array")

    validation._scores = out_of_memory  # type: ignore[assignment]
    return validation._task(checkpoint, **payload)


def dying(checkpoint: Any, **payload: Any) -> Any:
    """In place of the task: its process dies each time."""
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(checkpoint: Any, **payload: Any) -> Any:
    """In place of the task: it never ends."""
    threading.Event().wait()


FAILURES: dict[str, tuple[Any, str]] = {
    "raises": (
        raising,
        "of step 0 failed: out of memory: Unable to allocate 3.00 GiB for an array. To need",
    ),
    "dies": (dying, "validation (validation.mode: async): a process died each time"),
    "hangs": (hanging, "The validation of the checkpoint of step 0 has not come back within validation.timeout_s (5"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_validation_that_fails_ends_the_training_with_one_message(
    kind: str, small_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, expected = FAILURES[kind]
    monkeypatch.setattr(validation, "_task", task)
    monkeypatch.setattr(task, "__module__", "__main__")  # which workers cannot import: the function is sent to them
    mode = {"mode": "async", "timeout_s": 5 if kind == "hangs" else 600}
    path = write(small_table, tmp_path, validation=mode, training={"epochs": 1000})
    capfd.readouterr()
    assert main(["train", path]) == 2
    error = capfd.readouterr().err
    assert error.startswith("oml-ray: ")
    assert expected in error
    assert error.count("\n") == 1
