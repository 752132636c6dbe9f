"""Resources of gallery shards, and which of them run on GPUs: an index without a GPU form stays on the CPU."""

from __future__ import annotations

from oml_ray import build
from oml_ray.config import nodes
from oml_ray.distributed.progress import say
from oml_ray.distributed.runtime.resources import Needs, ProcessGroup


def needs(gallery: nodes.Gallery, scaling: nodes.Scaling) -> Needs:
    """Logical resources of a gallery: on GPUs at least one, which all shards share."""
    use_gpu = uses_gpu(gallery, scaling)
    shards = shard_group(gallery, scaling.placement.gallery, gpus=1 / gallery.shards if use_gpu else 0)
    formula = "evaluation.gallery.shards * evaluation.gallery.cpus_per_shard"
    return Needs(
        gallery.shards * gallery.cpus_per_shard,
        1 if use_gpu else 0,
        f"{formula} = {gallery.shards} * {gallery.cpus_per_shard}",
        (shards,),
        may_grow=scaling.autoscaling,
    )


def shard_group(gallery: nodes.Gallery, placement: nodes.Placement, *, gpus: float = 0) -> ProcessGroup:
    """Describe a gallery's shards as processes that run at one time, each with a share of a GPU."""
    return ProcessGroup(
        "gallery",
        placement,
        gallery.shards,
        "evaluation.gallery.shards",
        gallery.cpus_per_shard,
        "evaluation.gallery.cpus_per_shard",
        gpus,
    )


def uses_gpu(gallery: nodes.Gallery, scaling: nodes.Scaling) -> bool:
    """Return whether a gallery's shards run on GPUs: the config asks for it, and its index has a GPU form."""
    return scaling.uses_gpu("gallery") and cpu_reason(gallery) is None


def cpu_reason(gallery: nodes.Gallery) -> str | None:
    """Why a gallery's index stays on the CPU even with scaling.gpu.gallery; None where it has a GPU form."""
    return build.index_settings(gallery, use_gpu=False).cpu_reason() if isinstance(gallery, nodes.OfIndexes) else None


def say_indexes_on_cpu(evaluation: nodes.Evaluation, scaling: nodes.Scaling) -> None:
    """Say which indexes of an evaluation stay on the CPU although their gallery is to be searched on GPUs."""
    if not scaling.uses_gpu("gallery"):
        return
    galleries = {"evaluation.gallery": evaluation.gallery}
    galleries |= {f"evaluation.compare.{number}": gallery for number, gallery in enumerate(evaluation.compare)}
    for key, gallery in galleries.items():
        if (reason := cpu_reason(gallery)) is not None:
            say(f"# {key} is searched on the CPU: {reason}")
