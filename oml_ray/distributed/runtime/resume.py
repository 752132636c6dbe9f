"""Rules of resuming a run: which keys of its config may differ from those that it began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from oml_ray.config import SweepConfig, TrainConfig, differing_keys, nodes, stored, validate
from oml_ray.config.nodes.base import Node
from oml_ray.data.filesystem import join, read_if_exists
from oml_ray.errors import ConfigError, RunError
from oml_ray.training.checkpoint import FOLDER, META
from oml_ray.training.optimizers import keeps_state

EPOCHS = "training.epochs"


def check_changes(config: Node, old: Mapping[str, Any], may_differ: Iterable[str], uri: str) -> list[str]:
    """Check that a run may be resumed with another config.

    Args:
        config: the one to run.
        old: plain data of the one that the run began with.
        may_differ: keys that may always differ, with all keys below them.
        uri: folder of the run.

    Returns:
        Changes worth telling, such as "optimizer.lr: 0.1 -> 0.01".

    Raises:
        RunError: keys differ that may not, or the run has done more epochs than it shall have.
    """
    old, new = _with_defaults(config, old), stored(config)
    keys = [key for key in differing_keys(old, new) if not _covers(may_differ, key)]
    if isinstance(config, TrainConfig):
        if EPOCHS in keys:
            _check_epochs(config, uri)
        refused = [key for key in keys if not _covers(_allowed(config, old), key)]
    else:
        refused = keys
    if refused:
        raise RunError(_refusal(config, refused))
    changes = [f"{key}: {_at(old, key)} -> {_at(new, key)}" for key in keys]
    if any(key.startswith("optimizer") for key in keys) and not keeps_state(old["optimizer"], new["optimizer"]):
        changes.append("the state of the optimizer begins anew")
    return changes


def epochs_done(uri: str) -> float | None:
    """Epochs that the last checkpoint of a run has behind it, a begun one as a fraction; None where none can be read.

    Args:
        uri: folder of the run.
    """
    try:
        name = (read_if_exists(join(uri, FOLDER, "last")) or b"").decode().strip()
        position = json.loads(read_if_exists(join(uri, FOLDER, name, META)) or b"")["position"]
        return int(position["epoch"]) + (0.5 if position["step"] else 0.0)
    except (ValueError, LookupError, TypeError):
        return None


def _allowed(config: TrainConfig, old: Mapping[str, Any]) -> list[str]:
    """Keys that may differ this time: those that the user allows, and more epochs where the schedule has no end."""
    epochs = _at(old, EPOCHS)
    is_longer = isinstance(epochs, int) and epochs < config.training.epochs
    has_no_end = not isinstance(config.schedule, nodes.CosineSchedule)
    return [*config.run.allow_changes, *([EPOCHS] if is_longer and has_no_end else [])]


def _check_epochs(config: TrainConfig, uri: str) -> None:
    done = epochs_done(uri)
    if done is not None and config.training.epochs < done:
        raise RunError(
            f"{EPOCHS}: {config.training.epochs} is fewer than the epochs that {uri} has begun ({int(done + 0.5)}): "
            f"set it to at least {int(done + 0.5)}, choose another run.name, or start afresh with run.resume: never."
        )


def _refusal(config: Any, refused: list[str]) -> str:
    run = config.run
    text = (
        f"run.name: {run.name!r} under {run.storage} was run with another config; differing keys: "
        f"{', '.join(refused)}. Choose another run.name, or replace the old run with run.resume: never"
    )
    if isinstance(config, SweepConfig) or not all(_covers(nodes.ALLOWED_CHANGES, key) for key in refused):
        return f"{text}."
    allowing = [*getattr(run, "allow_changes", []), *refused]
    text += f", or continue it with the new values: --set 'run.allow_changes=[{', '.join(allowing)}]'."
    if EPOCHS in refused and isinstance(config.schedule, nodes.CosineSchedule):
        text += (
            " The cosine schedule ends with training.epochs, so it is stretched: the steps that are done had the "
            "learning rates of the old end."
        )
    return text


def _with_defaults(config: Node, old: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config with the keys that the schema has got since."""
    try:
        return stored(validate(type(config), old, "config"))
    except ConfigError:
        return old


def _covers(prefixes: Iterable[str], key: str) -> bool:
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
