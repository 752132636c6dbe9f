"""The configs of the verbs, and the checks of keys against each other."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Discriminator, Field, Tag, model_validator

from oml_ray.config import nodes
from oml_ray.config.nodes import Node


class TrainConfig(Node):
    """`oml-ray train`: one run from a table to a report."""

    seed: nodes.Seed = 42
    """Seed of everything random."""
    run: nodes.Run
    """Where the run lives."""
    data: nodes.Data
    """What it learns from."""
    transforms: nodes.Transforms
    """From decoded images to pixels."""
    extractor: nodes.Extractor
    """From pixels to embeddings."""
    criterion: nodes.Criterion
    """From embeddings and labels to the loss."""
    sampler: nodes.Sampler
    """What forms the global batch."""
    optimizer: nodes.Optimizer = nodes.Optimizer()
    """How parameters move."""
    schedule: nodes.Schedule = nodes.CosineSchedule(name="cosine")
    """How the learning rate moves."""
    training: nodes.Training = nodes.Training()
    """The loop."""
    checkpoint: nodes.Checkpoint = nodes.Checkpoint()
    """What is kept."""
    scaling: nodes.Scaling = nodes.Scaling()
    """Processes and resources; does not change the mathematics."""
    validation: nodes.Validation = nodes.Validation()
    """Judging during training."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """Judging at the end."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        batch, workers = self.sampler.batch_size, self.scaling.num_workers
        if workers > batch:
            raise ValueError(
                f"scaling.num_workers: {workers} workers cannot share a global batch of {batch} instances "
                f"(the sampler's): use at most {batch} workers."
            )
        if self.transforms.train.size != self.transforms.eval.size:
            raise ValueError(
                f"transforms.train.size ({self.transforms.train.size}) and transforms.eval.size "
                f"({self.transforms.eval.size}) differ: the extractor is built for one size."
            )
        if self.checkpoint.metric not in self.evaluation.metrics.names:
            raise ValueError(
                f"checkpoint.metric: {self.checkpoint.metric!r} is not computed: use one of "
                f"{', '.join(self.evaluation.metrics.names)}, or add its rank under evaluation.metrics."
            )
        extractor = self.extractor
        if isinstance(extractor, nodes.TimmExtractor) and extractor.pretrained and extractor.weights:
            raise ValueError("extractor.pretrained and extractor.weights exclude each other: set one of them.")
        only_backbone = extractor.embedding_dim is None and extractor.pooling != "gem"
        if self.training.freeze_epochs and only_backbone and isinstance(self.criterion, nodes.OfPairs):
            raise ValueError(
                "training.freeze_epochs freezes the backbone, and nothing else has parameters: "
                "set extractor.embedding_dim, or training.freeze_epochs: 0."
            )
        is_sharded = isinstance(self.criterion, nodes.OfProxies) and self.criterion.head.sharded
        if is_sharded and self.optimizer.name.lower() not in ("adamw", "sgd"):
            raise ValueError(
                f"optimizer.name: {self.optimizer.name!r} cannot move a sharded head (criterion.head.sharded): "
                "use adamw or sgd."
            )
        return self


def _source_kind(value: object) -> str | None:
    keys = value.keys() if isinstance(value, dict) else getattr(type(value), "model_fields", {}).keys()
    return next((kind for kind in ("checkpoint", "extractor") if kind in keys), None)


Source = Annotated[
    Annotated[nodes.CheckpointSource, Tag("checkpoint")] | Annotated[nodes.ExtractorSource, Tag("extractor")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message="needs one of the keys: checkpoint, extractor",
    ),
]


class EmbedConfig(Node):
    """`oml-ray embed`: a table becomes an embeddings store."""

    seed: nodes.Seed = 42
    """Seed of what an extractor without weights draws."""
    run: nodes.Run
    """Where the store goes."""
    data: nodes.SplitData
    """What is embedded."""
    source: Source
    """What embeds it."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """How: its `embed` node."""
    scaling: nodes.Scaling = nodes.Scaling()
    """Resources: its `use_gpu` and `data_cpus`."""


class EvaluateConfig(EmbedConfig):
    """`oml-ray evaluate`: a table is embedded, searched, measured and reported."""

    data: Annotated[nodes.SplitData, Field()]
    """What is evaluated: rows with queries and gallery."""

    @model_validator(mode="after")
    def _has_queries(self) -> Self:
        if self.data.split == "train":
            raise ValueError("data.split: train rows are neither queries nor gallery: evaluate 'validation'.")
        return self
