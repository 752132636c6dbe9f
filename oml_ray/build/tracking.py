"""From a config to the trackers of a run."""

from __future__ import annotations

from oml_ray.config import TrainConfig, nodes, stored
from oml_ray.training.run_directory import RunDirectory
from oml_ray.training.tracking import Tracker
from oml_ray.training.tracking.mlflow_tracker import MlflowTracker
from oml_ray.training.tracking.wandb_tracker import WandbTracker


def check_tracking(config: TrainConfig) -> None:
    """Find out early whether the run can be recorded where it should be.

    Raises:
        ConfigError, StorageError: it cannot.
    """
    for node in config.tracking:
        if isinstance(node, nodes.Mlflow):
            MlflowTracker.check(node.uri)
        else:
            WandbTracker.check()


def titled(config: TrainConfig, title: str) -> TrainConfig:
    """The config, its run called so wherever it is recorded, after what the user calls all runs there."""
    tracking = [
        node.model_copy(update={"title": f"{node.title}/{title}" if node.title else title}) for node in config.tracking
    ]
    return config.model_copy(update={"tracking": tracking})


def trackers(config: TrainConfig, run: RunDirectory) -> list[Tracker]:
    """Open what records the run elsewhere.

    Raises:
        ConfigError: there is no such place, or a package is missing.
    """
    return [_tracker(node, config, run) for node in config.tracking]


def _tracker(node: nodes.Mlflow | nodes.Wandb, config: TrainConfig, run: RunDirectory) -> Tracker:
    document, title = stored(config), node.title or run.name
    if isinstance(node, nodes.Mlflow):
        return MlflowTracker(run, document, title, node.uri, node.experiment)
    return WandbTracker(run, document, title, node.project, node.entity)
