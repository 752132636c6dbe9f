"""From config nodes to components: the only tables of names."""

from oml_ray.build.data import (
    FIGURES,
    evaluation_loader,
    figures_table,
    local_stream,
    plan,
    table,
    training_loader,
    transform,
)
from oml_ray.build.learning import criterion, extractor, learner, optimizer, trained_extractor
from oml_ray.build.retrieval import index_settings
from oml_ray.build.training import checkpoint_meta, factor, judging, loop, settings, validator, versions

__all__ = [
    "FIGURES",
    "checkpoint_meta",
    "criterion",
    "evaluation_loader",
    "extractor",
    "factor",
    "figures_table",
    "index_settings",
    "judging",
    "learner",
    "local_stream",
    "loop",
    "optimizer",
    "plan",
    "settings",
    "table",
    "trained_extractor",
    "training_loader",
    "transform",
    "validator",
    "versions",
]
