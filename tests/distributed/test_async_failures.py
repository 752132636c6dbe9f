"""Failures of an asynchronous validation, without Ray: each is an answer that the training finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError

from oml_ray.distributed.validation import _failures_answered
from oml_ray.errors import ImageError, OmlRayError
from oml_ray.training.run_directory import RunDirectory

FAILURES: dict[str, tuple[Exception, str]] = {
    "the user's": (ImageError("images/3.png cannot be read"), "images/3.png cannot be read"),
    "GPU memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
        "of memory: CUDA out of memory. Tried",
    ),
    "a dead actor": (ActorDiedError(), "a process died each time"),
    "unexpected": (KeyError("x"), "KeyError: 'x' (traceback: "),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_each_failure_is_answered(kind: str, tmp_path: Path) -> None:
    raised, expected = FAILURES[kind]
    run = RunDirectory(str(tmp_path), "run")
    with pytest.raises(OmlRayError) as caught, _failures_answered(run, 54):
        raise raised
    answer = json.loads((tmp_path / "run" / "validations" / "step_00000054.json").read_text())
    assert answer == {"error": str(caught.value)}
    assert expected in answer["error"]
    log = tmp_path / "run" / "logs" / "validation_step_00000054.log"
    if kind == "unexpected":
        assert str(log) in answer["error"]
        assert log.read_text().endswith("KeyError: 'x'\n")
        assert "Traceback (most recent call last)" in log.read_text()
    else:
        assert not log.exists()
