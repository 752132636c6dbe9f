"""What a sweep leaves: results.json and results.csv, the best config with its checkpoint, and a page for people."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from oml_ray import build
from oml_ray.config import EvaluateConfig, SweepConfig, TrainConfig, dump, nodes
from oml_ray.config.space import LogUniform, assignments, keys_of
from oml_ray.data.filesystem import join
from oml_ray.distributed import runs
from oml_ray.distributed.trials import FOLDER, Record, Trial, checkpoint_step, curve_of
from oml_ray.retrieval.report.sweep_page import SweepPage, SweepTrial, render_sweep
from oml_ray.training.checkpoint import FOLDER as CHECKPOINTS
from oml_ray.training.run_directory import History, RunDirectory

RESULTS, CSV, BEST, BEST_RUN = "results.json", "results.csv", "best.yaml", "best"


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    trial: Trial
    value: float | None
    """Its best metric: that of its best checkpoint, where it has one."""
    epoch: int | None
    """Epochs after which that was."""
    epochs: int
    """Epochs trained."""
    seconds: float
    """Training and validating."""
    checkpoint: str | None
    """Its best checkpoint."""

    @property
    def can_win(self) -> bool:
        """Whether it did not fail, and has something to use."""
        return self.trial.state != "failed" and self.checkpoint is not None and self.value is not None


def outcomes(record: Record) -> list[Outcome]:
    """What all trials came to, best first."""
    found = [_outcome(record, trial) for trial in record.trials]
    sign = -1 if record.mode == "max" else 1
    return sorted(
        found,
        key=lambda each: (not each.can_win, each.value is None, sign * each.value if each.value is not None else 0.0),
    )


def _outcome(record: Record, trial: Trial) -> Outcome:
    run = record.run_of(trial)
    rows = History(run).rows
    trial.curve = curve_of(run, record.metric)
    best = trial.best(record.mode)
    step = checkpoint_step(run, "best")
    if step is not None:
        # A trial that was stopped (or died) may have validated what it did not live to save.
        saved = [row for row in rows if row["kind"] == "validation" and row["step"] == step and row["epoch"] >= 0]
        best = (saved[-1]["epoch"] + 1, saved[-1][record.metric]) if saved else best
    return Outcome(
        trial,
        best[1] if best else None,
        best[0] if best else None,
        max((row["epoch"] + 1 for row in rows), default=0),
        sum(row["seconds"] for row in rows),
        None if step is None else join(run.uri, CHECKPOINTS, "best"),
    )


def best_config(config: SweepConfig, trial: Trial) -> TrainConfig:
    """The config of the best trial as a run of its own, beside the sweep."""
    return runs.resolved(config.trial(trial.values, f"{config.run.name}_best", config.run.storage))


def evaluation_of(config: SweepConfig, run: RunDirectory, best: Outcome) -> EvaluateConfig:
    """The evaluation of the best checkpoint, as a run inside the sweep's folder."""
    assert best.checkpoint is not None
    training = config.trial(best.trial.values, best.trial.name, join(run.uri, FOLDER))
    return EvaluateConfig(
        seed=training.seed,
        # Afresh, whatever trial was the best before.
        run=nodes.Run(name=BEST_RUN, storage=run.uri, resume="never"),
        data=nodes.SplitData(**training.data.model_dump(exclude={"store"}), split="validation"),
        source=nodes.CheckpointSource(checkpoint=best.checkpoint),
        evaluation=training.evaluation,
        scaling=training.scaling,
    )


def evaluated_value(run: RunDirectory, metric: str) -> float | None:
    """The metric that the evaluation of the best checkpoint found."""
    family, _, rank = metric.partition(".")
    text = run.read_text(BEST_RUN, runs.METRICS)
    value = json.loads(text or "{}").get("overall", {}).get(family, {}).get(rank, {}).get("value")
    return None if value is None else float(value)


def write(config: SweepConfig, run: RunDirectory, record: Record, found: list[Outcome]) -> dict[str, Any]:
    """Write everything; results.json last, as its presence says that the sweep is finished."""
    best = found[0] if found and found[0].can_win else None
    document = {
        "sweep": config.run.name,
        "metric": record.metric,
        "mode": record.mode,
        "counts": {
            state: sum(each.trial.state == state for each in found) for state in ("finished", "stopped", "failed")
        },
        "best": best
        and {**_row(best), "evaluated": evaluated_value(run, record.metric), "config": join(run.uri, BEST)},
        "trials": [_row(each) for each in found],
        "versions": build.versions(),
    }
    if best is not None:
        run.write_text(_best_yaml(config, record, best), BEST)
    else:
        run.remove(BEST)
    run.write_text(_csv(config, found), CSV)
    run.write_text(_page(config, run, record, found, document), runs.REPORT)
    run.write_text(json.dumps(document, indent=1), RESULTS)
    return document


def _row(outcome: Outcome) -> dict[str, Any]:
    trial = outcome.trial
    return {
        "trial": trial.name,
        "state": trial.state,
        "values": assignments(trial.values),
        "value": outcome.value,
        "epoch": outcome.epoch,
        "epochs": outcome.epochs,
        "seconds": round(outcome.seconds, 3),
        "checkpoint": outcome.checkpoint,
        "reason": trial.reason,
        "curve": [list(point) for point in trial.curve],
    }


def _best_yaml(config: SweepConfig, record: Record, best: Outcome) -> str:
    return (
        f"# The best of the {len(record.trials)} trials of the sweep {config.run.name}: trial {best.trial.name}, "
        f"{record.metric} {best.value:.4f} after {best.epoch} epochs.\n"
        f"# Its checkpoint: {best.checkpoint}\n"
        f"# This config trains it afresh, as a run of its own.\n" + dump(best_config(config, best.trial))
    )


def _csv(config: SweepConfig, found: list[Outcome]) -> str:
    keys = [key for entry in config.space for key in keys_of(entry)]
    plain = ["value", "epoch", "epochs", "seconds", "checkpoint", "reason"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", *keys, *plain])
    for row in map(_row, found):
        values = [row["values"][key] for key in keys]
        told = [json.dumps(value) if isinstance(value, dict | list) else value for value in values]
        writer.writerow([row["trial"], row["state"], *told, *(row[name] for name in plain)])
    return file.getvalue()


def _page(
    config: SweepConfig, run: RunDirectory, record: Record, found: list[Outcome], document: dict[str, Any]
) -> str:
    best = document["best"]
    facts = {}
    if best:
        facts = {
            record.metric: best["value"],
            f"{record.metric} of its evaluation": best["evaluated"],
            "after epochs": best["epoch"],
            **best["values"],
            "checkpoint": best["checkpoint"],
        }
    page = SweepPage(
        title=run.name,
        metric=record.metric,
        larger_is_better=record.mode == "max",
        entries=[keys_of(entry) for entry in config.space],
        log_keys=[entry for entry, domain in config.space.items() if isinstance(domain, LogUniform)],
        trials=[
            SweepTrial(
                each.trial.name,
                each.trial.state,
                assignments(each.trial.values),
                each.value,
                each.epoch,
                each.epochs,
                round(each.seconds),
                each.trial.curve,
                each.trial.reason or "",
            )
            for each in found
        ],
        best=best["trial"] if best else None,
        facts=facts,
        links={"its evaluation": f"{BEST_RUN}/{runs.REPORT}", BEST: BEST} if best else {},
        best_config=dump(best_config(config, found[0].trial)) if best else "",
        versions=document["versions"],
        config=dump(config),
    )
    return render_sweep(page)
