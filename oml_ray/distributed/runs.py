"""Runs by name: start, continue, or leave a run, and never mix two configs under one name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from oml_ray import build
from oml_ray.config import EmbedConfig, TrainConfig, differing_keys, dump, nodes, parse_yaml
from oml_ray.data.filesystem import exists, is_uri, join, resolve
from oml_ray.distributed.progress import say
from oml_ray.errors import RunError
from oml_ray.training.run_directory import RunDirectory

CONFIG, METRICS, REPORT, EMBEDDINGS = "config.yaml", "metrics.json", "report.html", "embeddings"

AnyConfig = TypeVar("AnyConfig", bound=TrainConfig | EmbedConfig)


def resolved(config: AnyConfig) -> AnyConfig:
    """Make every path of a config absolute: Ray changes the directory of its workers."""
    updates: dict[str, Any] = {"run": config.run.model_copy(update={"storage": _absolute(config.run.storage)})}
    data: dict[str, Any] = {"root": config.data.root and _absolute(config.data.root)}
    if config.data.table != build.FIGURES:
        data["table"] = _absolute(config.data.table)
    updates["data"] = config.data.model_copy(update=data)
    if isinstance(config, TrainConfig):
        if config.extractor.weights:
            weights = _absolute(config.extractor.weights)
            updates["extractor"] = config.extractor.model_copy(update={"weights": weights})
    elif (path := getattr(config.source, "checkpoint", None)) is not None:
        updates["source"] = config.source.model_copy(update={"checkpoint": _absolute(path)})
    elif isinstance(config.source, nodes.ExtractorSource) and config.source.extractor.weights:
        weights = _absolute(config.source.extractor.weights)
        extractor = config.source.extractor.model_copy(update={"weights": weights})
        updates["source"] = config.source.model_copy(update={"extractor": extractor})
    return cast(AnyConfig, config.model_copy(update=updates))


def check_name(config: TrainConfig | EmbedConfig) -> None:
    """Refuse a name that another config has used, without touching anything.

    Raises:
        RunError: names the keys that differ.
    """
    if config.run.resume == "never":
        return
    uri = join(config.run.storage, config.run.name)
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_stream(f"{path}/{CONFIG}") as stream:
            text = stream.read().decode()
    except OSError:
        return
    old, new = parse_yaml(text, f"{uri}/{CONFIG}"), config.model_dump(mode="json")
    differing = [key for key in differing_keys(old, new) if key.split(".")[0] not in ("scaling", "run")]
    if differing:
        raise RunError(
            f"run.name: {config.run.name!r} under {config.run.storage} was run with another config; differing keys: "
            f"{', '.join(differing)}. Choose another run.name, or replace the old run with run.resume: never."
        )


def is_finished(config: TrainConfig | EmbedConfig) -> bool:
    """Whether the run of this config has its metrics; says so."""
    uri = join(config.run.storage, config.run.name)
    if config.run.resume == "never" or not exists(join(uri, METRICS)):
        return False
    say(f"{uri} is finished; its report is {join(uri, REPORT)} (run.resume: never starts it afresh).")
    return True


def open_run(config: TrainConfig | EmbedConfig) -> RunDirectory:
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
        clear(run, [METRICS, REPORT, EMBEDDINGS, "checkpoints", "tensorboard", "history.jsonl", CONFIG])
    # What differs by the rules (scaling, storage) is what this process was asked for.
    run.write_text(dump(config), CONFIG)
    return run


def clear(run: RunDirectory, names: Iterable[str]) -> None:
    """Remove files and folders of a run."""
    for name in names:
        run.remove(name)


def ray_name(config: TrainConfig | EmbedConfig) -> str:
    """Name for Ray's own records, new at every start: Ray would continue an old one by itself."""
    return f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _absolute(path: str) -> str:
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))
