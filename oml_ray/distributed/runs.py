"""Runs by name: start, continue, or leave a run, and never mix two configs under one name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from oml_ray import build
from oml_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    SearchConfig,
    SweepConfig,
    TrainConfig,
    dump,
    nodes,
    parse_yaml,
)
from oml_ray.data.filesystem import exists, is_uri, join, read_if_exists
from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime import driver_log, resume
from oml_ray.errors import ConfigError, RunError
from oml_ray.redaction import redacted
from oml_ray.storage import retries
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking import mlflow_tracker, tracker, wandb_tracker

CONFIG, METRICS, REPORT, EMBEDDINGS = "config.yaml", "metrics.json", "report.html", build.EMBEDDINGS
NEIGHBORS, PER_QUERY, QUERIES = "neighbors.parquet", "per_query.parquet", "queries.parquet"

# Keys whose text is a path or a URI.
PATHS = {"storage", "table", "root", "weights", "checkpoint", "store", "embeddings", "index", "queries", "gallery",
         "gallery_root"}  # fmt: skip

# What a run remembers of its trackers.
TRACKING = (tracker.IDENTITY, mlflow_tracker.UNSENT, wandb_tracker.FOLDER)

# Keys that may change when a run is continued.
MAY_DIFFER = ("scaling", "run", "tracking", "storage")

# What Ray sets for the command of a submitted job, and for nothing else: not for its tasks, actors and workers.
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

Config = TrainConfig | EmbedConfig | EvaluateConfig | SearchConfig | SweepConfig
AnyConfig = TypeVar("AnyConfig", bound=Config)


def resolved(config: AnyConfig) -> AnyConfig:
    """Make every path of a config absolute, because Ray workers run in another directory, and apply `storage`.

    The retries of storage hold from here on, in this process and in those that it starts.

    Raises:
        ConfigError: a path is relative in a Ray job; names the keys.
    """
    if IN_A_JOB in os.environ:
        _check_none_relative(config)
    storage = config.training.storage if isinstance(config, SweepConfig) else config.storage
    retries.configure(storage.retries, storage.first_wait_s)
    return cast(AnyConfig, _resolved(config))


def _check_none_relative(config: Config) -> None:
    """Refuse paths inside a job's working directory: it is a copy of code and configs that is removed with the job."""
    paths = list(_paths(config))
    if isinstance(config, SweepConfig):  # of the base, all but its run, in whose place each trial has one of its own
        paths += [(key, path) for key, path in _paths(config.training, "base.") if not key.startswith("base.run.")]
    relative = [f"{key}: {path}" for key, path in paths if _is_relative(path)]
    if relative:
        raise ConfigError(
            "In a Ray job relative paths lead into a copy of its working directory, which is lost with the job: "
            f"{', '.join(relative)}. Set them to URIs (such as --set run.storage=s3://bucket/runs), or to absolute "
            "paths that all nodes reach."
        )


def _resolved(node: Any) -> Any:
    if isinstance(node, list):
        return [_resolved(item) for item in node]
    if not isinstance(node, nodes.Node):
        return node
    updates = {name: _resolved(getattr(node, name)) for name in type(node).model_fields}
    for name, value in updates.items():
        if is_path(name, value):
            updates[name] = absolute(value)
    return node.model_copy(update=updates)


def check_apart(config: Config) -> None:
    """Refuse a run in whose folder lies what it reads: `resume: never` would remove that first.

    Raises:
        ConfigError: names the key.
    """
    own = join(config.run.storage, config.run.name)
    for key, uri in _paths(config):
        if f"{uri}/".startswith(f"{own}/"):
            raise ConfigError(f"{key}: {uri} belongs to the run {own} that would be written: change run.name.")


def _paths(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of a config whose value is a path."""
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, nodes.Node):
            yield from _paths(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    yield from _paths(item, f"{prefix}{name}.{index}.")
        elif is_path(name, value):
            yield f"{prefix}{name}", value


def is_path(name: str, value: Any) -> bool:
    """Whether a key's value is a path; the generated table is none."""
    return name in PATHS and isinstance(value, str) and (name, value) != ("table", build.FIGURES)


def check_name(config: Config, may_differ: Iterable[str] = MAY_DIFFER) -> bool:
    """Whether the name holds a run to continue; refuse one that another config has used, without touching anything.

    Args:
        config: what is to run.
        may_differ: keys whose values may have changed.

    Raises:
        RunError: names the keys that differ.
    """
    return changes(config, may_differ) is not None


def changes(config: Config, may_differ: Iterable[str] = MAY_DIFFER) -> list[str] | None:
    """List how a config differs from that of the run that it continues, None where the name holds no run.

    Raises:
        RunError: keys differ that may not.
    """
    if config.run.resume == "never":
        return None
    uri = join(config.run.storage, config.run.name)
    data = read_if_exists(join(uri, CONFIG))
    if data is None:
        return None
    text = data.decode("utf-8", "replace")
    # Both without credentials, which no run keeps: other ones do not make it another run.
    return resume.check_changes(config, redacted(parse_yaml(text, f"{uri}/{CONFIG}")), may_differ, uri)


def is_finished(config: Config) -> bool:
    """Return whether the run of this config has its metrics, and is not to be trained for more epochs; says so."""
    uri = join(config.run.storage, config.run.name)
    if config.run.resume == "never" or not exists(join(uri, METRICS)) or _is_to_be_trained(config):
        return False
    say(f"{uri} is finished; its report is {join(uri, REPORT)} (run.resume: never starts it afresh).")
    return True


def _is_to_be_trained(config: Config) -> bool:
    """Return whether the last checkpoint of a training lies before its end."""
    if not isinstance(config, TrainConfig):
        return False
    done = resume.epochs_done(join(config.run.storage, config.run.name))
    return done is not None and done < config.training.epochs


def say_checked(config: Config) -> None:
    """Print a config, every default spelled out, whose dry run found nothing wrong."""
    say(f"{dump(config)}# This config can run: all was checked that can be checked without computing.")


def open_run(config: Config) -> RunDirectory:
    """Open the run's directory: continue what is there, or clear it for `resume: never`.

    Raises:
        RunError: another config has used the name.
        StorageError: it cannot be written.
    """
    check_name(config)
    run = RunDirectory(config.run.storage, config.run.name)
    if config.run.resume == "never":
        names = run.names()
        if names and CONFIG not in names:
            raise RunError(
                f"run.resume: never would replace what lies in {run.uri}, which is no run (it has no {CONFIG}): "
                "choose another run.name, or remove the folder yourself."
            )
        # The metrics first and the config last: killed in between, it is still a run, and not a finished one.
        results = [METRICS, REPORT, NEIGHBORS, PER_QUERY, QUERIES, EMBEDDINGS]
        clear(run, [*results, *TRACKING, "checkpoints", "validations", "tensorboard", "history.jsonl",
                    driver_log.FOLDER, CONFIG])  # fmt: skip
    elif _is_to_be_trained(config):  # the metrics first: what a finished run of fewer epochs has is made anew
        clear(run, [METRICS, REPORT, NEIGHBORS, PER_QUERY, EMBEDDINGS])
    # What differs by the rules (scaling, storage) is what this process was asked for.
    run.write_text(dump(config), CONFIG)
    driver_log.keep_in(run)
    return run


def replace_lost_best(run: RunDirectory) -> None:
    """Have the newest checkpoint stand in for a best one that is gone; says so."""
    if (name := checkpoints.replace_lost_best(run)) is not None:
        say(f"# warning: the best checkpoint of {run.uri} is gone: {name} is evaluated in its place")


def clear(run: RunDirectory, names: Iterable[str]) -> None:
    """Remove files and folders of a run."""
    for name in names:
        run.remove(name)


def ray_name(config: Config) -> str:
    """Name for Ray's own records, new at every start: Ray would continue an old one by itself."""
    return f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def absolute(path: str) -> str:
    """An absolute path, or a URI as it is."""
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def _is_relative(path: str) -> bool:
    return not is_uri(path) and not os.path.isabs(os.path.expanduser(path))
