"""Nodes of tracking: where the records of a run go beside its own directory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oml_ray.config.nodes.base import Node

Name = Annotated[str, Field(min_length=1)]


class Mlflow(Node):
    name: Literal["mlflow"]
    uri: Name | None = None
    """Of the tracking server (http://host:5000), or sqlite:////absolute/file.db on one machine; null: what
    MLFLOW_TRACKING_URI says, on every node."""
    experiment: Name = "oml_ray"
    """Experiment of the run; made if need be."""
    title: Name | None = None
    """Name of the run there; null: `run.name`, or that of the sweep and the trial."""


class Wandb(Node):
    name: Literal["wandb"]
    project: Name = "oml_ray"
    """Project of the run."""
    entity: Name | None = None
    """User or team; null: that of the key (WANDB_API_KEY, or `wandb login`)."""
    title: Name | None = None
    """Name of the run there; null: `run.name`, or that of the sweep and the trial."""


Tracker = Annotated[Mlflow | Wandb, Field(discriminator="name")]
