"""The configs of the verbs, and the checks of keys against each other."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from oml_ray.config import nodes
from oml_ray.config.nodes import Node


class TrainConfig(Node):
    """`oml-ray train`: one run from a table to a report."""

    seed: nodes.Seed = 42
    """Seed of everything random."""
    run: nodes.TrainRun
    """Where the run lives."""
    data: nodes.TrainData
    """What it learns from."""
    transforms: nodes.Transforms
    """From decoded images to pixels."""
    model: nodes.PairModel | None = None
    """In place of `extractor`: what judges pairs, to re-rank the neighbors that are found in `data.store`."""
    extractor: nodes.Extractor | None = Field(None, validate_default=True)
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
    storage: nodes.Storage = nodes.Storage()
    """Retries of transient storage errors."""
    validation: nodes.Validation = nodes.Validation()
    """Judging during training."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """Judging at the end."""
    tracking: list[nodes.Tracker] = Field([])
    """Where the run is recorded beside its own directory, e.g. [{name: mlflow, uri: http://host:5000}]."""

    @field_validator("tracking")
    @classmethod
    def _is_each_once(cls, value: list[nodes.Tracker]) -> list[nodes.Tracker]:
        if len({node.name for node in value}) < len(value):
            raise ValueError("a run is recorded once by each tracker: leave out what is there twice")
        return value

    @field_validator("extractor")
    @classmethod
    def _one_of_both(cls, value: nodes.Extractor | None, info: ValidationInfo) -> nodes.Extractor | None:
        model = info.data.get("model")
        if value is None and model is None and "model" in info.data:
            raise PydanticCustomError("missing", "one of extractor and model is needed")
        if value is not None and model is not None:
            raise ValueError("extractor and model exclude each other: one gives embeddings, the other judges pairs")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check_pairs(self)
        batch, what = self.sampler.batch_size, "instances"
        if isinstance(self.sampler, nodes.HardPairsSampler):
            batch, what = self.sampler.n_pairs, "pairs"
        workers = self.scaling.most_workers
        if workers > batch:
            raise ValueError(
                f"scaling.num_workers: {workers} workers cannot share a global batch of {batch} {what} "
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
        extractor = self.extractor or getattr(self.model, "extractor", None)
        if isinstance(extractor, nodes.TimmExtractor) and extractor.pretrained and extractor.weights:
            raise ValueError("extractor.pretrained and extractor.weights exclude each other: set one of them.")
        only_backbone = extractor is not None and extractor.embedding_dim is None and extractor.pooling != "gem"
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
        if isinstance(self.schedule, nodes.StepSchedule) and max(self.schedule.epochs) >= self.training.epochs:
            raise ValueError(
                f"schedule.epochs: should be less than training.epochs ({self.training.epochs}), when training ends, "
                f"found {self.schedule.epochs}."
            )
        if self.validation.mode == "async" and self.validation.every == 0:
            raise ValueError(
                "validation.mode is async, but every is 0, so nothing would be validated: set it to 1 or more, or "
                "use validation.mode: inline."
            )
        if isinstance(self.criterion, nodes.Triplet):
            _check_miner(self.criterion, self.sampler)
        return self


def _check_pairs(config: TrainConfig) -> None:
    """Refuse what belongs to models of pairs without one, and the other way round."""
    is_pairs = config.model is not None
    given = {
        "criterion": (config.criterion.name, isinstance(config.criterion, nodes.PairsBCE), "name: pairs_bce"),
        "sampler": (config.sampler.name, isinstance(config.sampler, nodes.HardPairsSampler), "name: hard_pairs"),
        "data.store": (config.data.store, config.data.store is not None, "an embeddings store"),
    }
    for key, (found, is_of_pairs, needed) in given.items():
        if is_of_pairs and not is_pairs:
            raise ValueError(f"{key}: {found} is for models that judge pairs: set model in place of extractor.")
        if is_pairs and not is_of_pairs:
            raise ValueError(f"{key}: a model of pairs needs {needed}, found {found!r}.")
    if is_pairs:
        config.evaluation.check_reranked()
    if is_pairs and config.validation.mode == "async":
        raise ValueError("validation.mode: models of pairs are validated inline: use inline.")


def _check_miner(criterion: nodes.Triplet, sampler: nodes.Sampler) -> None:
    """Refuse a miner whose arguments contradict one another, or that finds nothing in any batch of the sampler's."""
    miner = criterion.miner
    if isinstance(miner, nodes.DistanceWeightedMiner) and not miner.cutoff < miner.nonzero_loss_cutoff <= 2:
        raise ValueError(
            f"criterion.miner.nonzero_loss_cutoff: should be greater than cutoff ({miner.cutoff}) and less than or "
            f"equal to 2, found {miner.nonzero_loss_cutoff}."
        )
    repeats_labels = getattr(sampler, "resample_labels", False)
    if not isinstance(miner, nodes.NHardMiner) or not isinstance(sampler, nodes.OfLabels) or repeats_labels:
        return
    negatives = sampler.batch_size - sampler.n_instances
    in_batch = (("n_positive", miner.n_positive, sampler.n_instances - 1), ("n_negative", miner.n_negative, negatives))
    for name, ranks, most in in_batch:
        if isinstance(ranks, list) and ranks[0] > most and criterion.bank is None:
            raise ValueError(
                f"criterion.miner.{name}: the first rank should be less than or equal to {most}, as an instance has no "
                f"more of them in a batch (sampler), found {ranks}."
            )


def _source_kind(value: object) -> str | None:
    keys = value.keys() if isinstance(value, dict) else getattr(type(value), "model_fields", {}).keys()
    return next((kind for kind in ("checkpoint", "extractor", "store", "embeddings") if kind in keys), None)


ImageSource = Annotated[
    Annotated[nodes.CheckpointSource, Tag("checkpoint")] | Annotated[nodes.ExtractorSource, Tag("extractor")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message="needs one of the keys: checkpoint, extractor",
    ),
]
AnySource = Annotated[
    Annotated[nodes.CheckpointSource, Tag("checkpoint")]
    | Annotated[nodes.ExtractorSource, Tag("extractor")]
    | Annotated[nodes.StoreSource, Tag("store")]
    | Annotated[nodes.EmbeddingsSource, Tag("embeddings")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message="needs one of the keys: checkpoint, extractor, store, embeddings",
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
    source: ImageSource
    """What embeds it."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """How: its `embed` node."""
    scaling: nodes.Scaling = nodes.Scaling()
    """Resources: its `use_gpu`, `gpu` and `data_cpus`."""
    storage: nodes.Storage = nodes.Storage()
    """Retries of transient storage errors."""


class EvaluateConfig(Node):
    """`oml-ray evaluate`: a table is embedded, or embeddings are there; they are searched, measured and reported."""

    seed: nodes.Seed = 42
    """Seed of what an extractor without weights draws."""
    run: nodes.Run
    """Where the report goes."""
    data: nodes.SplitData | None = None
    """What is evaluated: rows with queries and gallery. A store brings its rows itself, as do embeddings in Parquet."""
    source: AnySource
    """What embeds it, or where its embeddings are."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """How it is embedded, searched and measured."""
    scaling: nodes.Scaling = nodes.Scaling()
    """Resources: its `use_gpu`, `gpu` and `data_cpus`."""
    storage: nodes.Storage = nodes.Storage()
    """Retries of transient storage errors."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.data is None and isinstance(self.source, nodes.CheckpointSource | nodes.ExtractorSource):
            raise ValueError("data is missing: images are embedded from a table; set data.table.")
        if self.data is not None and self.data.split == "train":
            raise ValueError("data.split: train rows are neither queries nor gallery: evaluate 'validation'.")
        return self


class QueryImages(Node):
    """How the images of a search are read."""

    root: Annotated[str, Field(min_length=1)] | None = None
    """Folder or URI that the paths of a table of queries are relative to; null: the table's own folder."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A query that cannot be read ends the job, or is left out and listed."""
    max_pixels: nodes.Positive = nodes.Data.model_fields["max_pixels"].default
    """Images announcing more pixels are refused before they are decoded."""
    exif: nodes.Exif = nodes.Data.model_fields["exif"].default
    """EXIF orientation of queries and of the page's pictures: apply turns them upright; ignore: as stored."""
    background: nodes.Color = nodes.Data.model_fields["background"].default
    """Colour [red, green, blue], 0 to 255, that transparent pixels are composited over."""


class SearchConfig(Node):
    """`oml-ray search`: images are searched in a store; no labels are needed."""

    seed: nodes.Seed = 42
    """Seed of what an extractor without weights draws."""
    run: nodes.Run
    """Where neighbors and page go."""
    source: ImageSource
    """What embeds the queries: what made the store."""
    queries: Annotated[str, Field(min_length=1)]
    """Folder of images, searched with all its folders, or a CSV, TSV or Parquet table with a column path."""
    data: QueryImages = QueryImages()
    """How they are read."""
    gallery: Annotated[str, Field(min_length=1)]
    """Embeddings store to search: the folder `embeddings` of a run, or the run itself."""
    gallery_root: Annotated[str, Field(min_length=1)] | None = None
    """What the store's image paths are relative to, for the page's pictures; null: the page shows these paths."""
    k: nodes.Positive = 10
    """Neighbors of each query."""
    evaluation: nodes.Evaluation = nodes.Evaluation()
    """How queries are embedded (`embed`), the store is searched (`gallery`), and what the page shows (`pictures`)."""
    scaling: nodes.Scaling = nodes.Scaling()
    """Resources: its `use_gpu`, `gpu` and `data_cpus`."""
    storage: nodes.Storage = nodes.Storage()
    """Retries of transient storage errors."""

    @model_validator(mode="after")
    def _is_not_reranked(self) -> Self:
        if self.evaluation.rerank:
            raise ValueError(
                "evaluation.rerank: search gives what is nearest and does not re-rank: leave it out, or use "
                "oml-ray evaluate."
            )
        return self
