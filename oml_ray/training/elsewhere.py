"""Validations elsewhere: training hands its checkpoints over, goes on, and takes up what comes back.

A checkpoint that is due is kept until its validation has come back as `validations/step_00000054.json`, from which
rank 0 makes the history's row. What the history lacks is handed over again by whoever continues the run: so nothing is
lost when either side dies, and what was validated twice counts once.
"""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

from oml_ray.errors import OmlRayError, RunError
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.judging import Judging
from oml_ray.training.run_directory import History, RunDirectory

FOLDER = "validations"


class Validations:
    """What of a run is validated elsewhere; one process at a time takes it up."""

    def __init__(self, run: RunDirectory, history: History, judging: Judging) -> None:
        """Look at a run.

        Args:
            run: where checkpoints and answers are.
            history: the run's, which gets the rows.
            judging: which checkpoints are validated, and which is the best.
        """
        self._run, self._history, self._judging = run, history, judging
        self._progress_s: float | None = None
        self._oldest: int | None = None

    def rewind(self, step: int) -> None:
        """Forget answers to checkpoints after a step, which are made again, and failures of earlier processes."""
        for name in self._run.names(FOLDER):
            of_step = checkpoints.step_of(name.removesuffix(".json"))
            if of_step > step or (name.endswith(".json") and "error" in self._answer(of_step)):
                self._run.remove(FOLDER, name)

    def waiting(self) -> list[int]:
        """Global steps of the checkpoints whose validation the history lacks, in order."""
        done = {row["step"] for row in self._history.rows if row["kind"] == "validation"}
        steps = [checkpoints.step_of(name) for name in checkpoints.names(self._run)]
        return [step for step in steps if self._judging.is_due(step) and step not in done]

    def take_up(self) -> list[dict[str, Any]]:
        """Add what came back to the history, in the order of the steps, and move `best`; return the new rows.

        Raises:
            RunError: a validation failed.
        """
        rows = []
        for step in self.waiting():
            answer = self._answer(step)
            if not answer:
                break
            if "error" in answer:
                self.remove(step)
                raise RunError(f"The validation of the checkpoint of step {step} failed: {answer['error']}")
            epoch = step // self._judging.steps_per_epoch - 1
            row = {"kind": "validation", "epoch": epoch, "step": step, "seconds": answer["seconds"], **answer["scores"]}
            if epoch >= 0 and self._is_best(row):
                checkpoints.move_best(self._run, step)
            self._history.append({**row, "timings": {}})
            self._history.publish()
            self.remove(step)
            rows.append(row)
        return rows

    def check_progress(self, timeout_s: float) -> None:
        """Refuse to wait any longer for validations of which none comes back.

        Args:
            timeout_s: seconds since the last came back, or since the first was handed over.

        Raises:
            RunError: they have passed.
        """
        waiting, now = self.waiting(), monotonic()
        if self._progress_s is None or not waiting or waiting[0] != self._oldest:
            self._progress_s, self._oldest = now, next(iter(waiting), None)
        elif now - self._progress_s > timeout_s:
            raise no_answer(waiting[0], timeout_s)

    def _answer(self, step: int) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._run.read_text(FOLDER, f"{checkpoints.name_of(step)}.json") or "{}")
        return answer

    def remove(self, step: int) -> None:
        """Remove what a validation left, after it was taken up."""
        for name in (f"{checkpoints.name_of(step)}.json", checkpoints.name_of(step)):
            self._run.remove(FOLDER, name)

    def _is_best(self, row: dict[str, Any]) -> bool:
        metric = self._judging.metric
        rows = (each for each in self._history.rows if each["kind"] == "validation" and each["epoch"] >= 0)
        return self._judging.is_best(row[metric], (each[metric] for each in rows))


def no_answer(step: int, timeout_s: float) -> RunError:
    """The error of a validation that does not come back."""
    return RunError(
        f"The validation of the checkpoint of step {step} has not come back within validation.timeout_s ({timeout_s:g} "
        "seconds): it waits for CPUs or GPUs, hangs, or takes longer. Give it more of them, raise the timeout, or use "
        "validation.mode: inline."
    )


def answer(run: RunDirectory, step: int, scores: dict[str, float] | OmlRayError, seconds: float) -> None:
    """Leave what the validation of a checkpoint found, for the training to take up."""
    found: dict[str, Any] = {"scores": scores, "seconds": seconds}
    if isinstance(scores, OmlRayError):
        found = {"error": str(scores)}
    run.write_text(json.dumps(found), FOLDER, f"{checkpoints.name_of(step)}.json")


def answered(run: RunDirectory, step: int) -> dict[str, float] | None:
    """What an earlier validation of a checkpoint found, None where there was none."""
    found: dict[str, dict[str, float]] = json.loads(run.read_text(FOLDER, f"{checkpoints.name_of(step)}.json") or "{}")
    return found.get("scores")
