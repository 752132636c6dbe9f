"""From config nodes to components: the only tables of names.

Its parts are imported when they are first asked for: a shard of a gallery should not wait for networks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oml_ray.build.criteria import criterion
    from oml_ray.build.data import (
        FIGURES,
        evaluation_loader,
        figures_table,
        image_reader,
        loaders,
        local_stream,
        plan,
        table,
        training_loader,
        transform,
    )
    from oml_ray.build.learning import (
        extractor,
        learner,
        optimizer,
        trained_extractor,
        trained_pair_model,
        weights_of,
    )
    from oml_ray.build.retrieval import index_settings
    from oml_ray.build.stores import EMBEDDINGS, open_store
    from oml_ray.build.tracking import check_tracking, titled, trackers
    from oml_ray.build.training import checkpoint_meta, factor, judging, loop, settings, validator, versions

__all__ = [
    "EMBEDDINGS",
    "FIGURES",
    "check_tracking",
    "checkpoint_meta",
    "criterion",
    "evaluation_loader",
    "extractor",
    "factor",
    "figures_table",
    "image_reader",
    "index_settings",
    "judging",
    "learner",
    "loaders",
    "local_stream",
    "loop",
    "open_store",
    "optimizer",
    "plan",
    "settings",
    "table",
    "titled",
    "trackers",
    "trained_extractor",
    "trained_pair_model",
    "training_loader",
    "transform",
    "validator",
    "versions",
    "weights_of",
]

_PARTS = ("data", "stores", "retrieval", "criteria", "learning", "tracking", "training")  # light ones first


def __getattr__(name: str) -> Any:
    if name in __all__:
        for part in _PARTS:
            found = getattr(import_module(f"{__name__}.{part}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
