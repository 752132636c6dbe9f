"""The schema's nodes: every key of a config, its type, its default and what it means. Defaults live here alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Node(BaseModel):
    """A mapping in a config: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Run(Node):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder of the run under `storage`: letters, digits, dot, dash, underscore."""
    storage: Annotated[str, Field(min_length=1)] = "runs"
    """Path or URI under which runs lie; on a cluster all nodes must reach it."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue an unfinished run of the same config; never: start afresh, replacing what the name holds."""


class Data(Node):
    table: Annotated[str, Field(min_length=1)]
    """`figures` (generated), or a path or URI of a CSV or Parquet table."""
    root: str | None = None
    """Folder or URI that the table's paths are relative to; null: the table's own folder."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop, or be replaced (training) or left out and listed (evaluation)."""
    max_pixels: Positive = 89_478_485
    """Images announcing more pixels are refused before they are decoded."""


class SplitData(Data):
    split: Literal["train", "validation", "all"] = "validation"
    """Rows of the table to use."""


class Resize(Node):
    name: Literal["resize"]
    size: Positive
    """Side of the square, in pixels."""


class CropFlip(Node):
    name: Literal["crop_flip"]
    size: Positive
    """Side of the square, in pixels."""
    scale: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.6, 1.0]
    """Smallest and largest share of the image's area that the crop covers."""
    ratio: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.75, 1.3333333333333333]
    """Smallest and largest width over height of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be [smallest, largest] with 0 < smallest <= largest, found {[low, high]}"
                )
        return self


Transform = Annotated[Resize | CropFlip, Field(discriminator="name")]


class Transforms(Node):
    train: Transform
    """Augmentation of train images."""
    eval: Transform
    """Preparation of images that are embedded: nothing random."""


class TimmExtractor(Node):
    name: Literal["timm"]
    model: Annotated[str, Field(min_length=1)]
    """timm's name of the network."""
    pretrained: bool = False
    """Load timm's weights from the model hub."""
    weights: str | None = None
    """Local weights of the backbone, or a checkpoint folder of a run; by name, or in order where only names differ."""
    embedding_dim: Positive | None = None
    """Width of a linear projection; null: the network's own features."""
    hidden_dims: list[Positive] = []
    """Widths of hidden layers before the projection: an MLP."""
    normalize: bool = True
    """Give embeddings unit L2 norm."""


Extractor = TimmExtractor


class AllMiner(Node):
    name: Literal["all"]


class HardMiner(Node):
    name: Literal["hard"]


Miner = Annotated[AllMiner | HardMiner, Field(discriminator="name")]


class Triplet(Node):
    name: Literal["triplet"]
    margin: Rate | None = 0.2
    """Distance by which a negative must be farther than a positive; null: the soft margin."""
    miner: Miner = HardMiner(name="hard")
    """Which triplets of the global batch the loss sees."""
    bank: None = None
    """Memory of earlier batches; null: none."""


Criterion = Triplet


class BalanceSampler(Node):
    name: Literal["balance"]
    n_labels: Annotated[int, Field(ge=2)]
    """Labels in the global batch."""
    n_instances: Annotated[int, Field(ge=2)]
    """Instances of each label in the global batch."""

    @property
    def batch_size(self) -> int:
        """Instances in the global batch."""
        return self.n_labels * self.n_instances


Sampler = BalanceSampler


class Optimizer(Node):
    name: Annotated[str, Field(min_length=1)] = "adamw"
    """Any optimizer of torch.optim, in any case: adamw, sgd, rmsprop, ..."""
    lr: Rate = 1e-3
    """Learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Weight decay."""
    criterion_lr: Rate | None = None
    """Learning rate of the criterion's own parameters; null: `lr`."""
    projection_lr: Rate | None = None
    """Learning rate of the extractor's projection; null: `lr`."""
    options: dict[str, Any] = {}
    """Further arguments of the torch optimizer, e.g. {momentum: 0.9}."""


class ConstantSchedule(Node):
    name: Literal["constant"]
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate grows linearly from zero."""


class CosineSchedule(Node):
    name: Literal["cosine"]
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate grows linearly from zero."""
    final: Probability = 0.0
    """Share of the learning rate that is left at the end."""


class StepSchedule(Node):
    name: Literal["step"]
    epochs: Annotated[list[Positive], Field(min_length=1)]
    """Epochs after which the learning rate is multiplied by `factor`."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """See `epochs`."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate grows linearly from zero."""


Schedule = Annotated[ConstantSchedule | CosineSchedule | StepSchedule, Field(discriminator="name")]


class Training(Node):
    epochs: Positive = 5
    """Epochs of the plan."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the extractor: bf16 and fp16 by autocast, fp64 throughout."""
    micro_batch: None = None
    """Instances embedded at once; null: the whole slice."""
    clip_grad_norm: Rate | None = None
    """Largest L2 norm of the gradient of all parameters; null: no clipping."""
    freeze_epochs: NonNegative = 0
    """First epochs in which the backbone does not learn."""
    ema: None = None
    """Moving average of the weights; null: none."""
    log_every: Positive = 10
    """Steps between two entries of the TensorBoard events and of the progress line."""


class Checkpoint(Node):
    every_steps: Positive | None = None
    """Also checkpoint after every so many steps; null: at the end of epochs only."""
    metric: Annotated[str, Field(pattern=r"^[a-z_]+\.[0-9]+$")] = "cmc.1"
    """Metric that decides which checkpoint is the best."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""
    keep: Positive = 2
    """Newest checkpoints to keep, beside the best."""


class Scaling(Node):
    num_workers: Positive = 2
    """Training processes."""
    use_gpu: bool = False
    """Give every worker and every actor a GPU."""
    cpus_per_worker: Positive = 1
    """CPUs (and compute threads) of a worker."""
    data_cpus: Positive = 1
    """CPUs for decoding, beside the workers' own."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Deaths of workers to recover from; -1: any number."""


class Validation(Node):
    every: NonNegative = 1
    """Epochs between two validations; 0: none during training."""
    mode: Literal["inline"] = "inline"
    """inline: the training workers validate between epochs."""
    at_start: bool = True
    """Validate before the first step: what the extractor scores untrained."""


class Embed(Node):
    actors: Positive = 1
    """Processes that embed, one GPU each where there are GPUs."""
    batch_size: Positive = 128
    """Images in one forward pass."""
    rows_per_part: Positive = 1024
    """Rows in one Parquet part: the unit of resuming, and what a decode task holds in memory."""
    cpus_per_actor: Positive = 1
    """CPUs (and compute threads) of an actor."""


class Gallery(Node):
    backend: Literal["exact"] = "exact"
    """exact: by the definition of distance, every pair considered."""
    shards: Positive = 2
    """Actors over which the gallery is split."""
    precision: Literal["fp32"] = "fp32"
    """Arithmetic of the first pass."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Smaller is nearer."""
    block_rows: Positive = 4096
    """Rows of a block of queries or gallery: bounds the memory of a search."""


class Bootstrap(Node):
    samples: Positive = 1000
    """Resamples of the queries."""
    seed: Seed = 0
    """Seed of the resampling."""


class Metrics(Node):
    cmc: list[Positive] = [1, 5, 10]
    """Ranks k of cmc@k."""
    precision: list[Positive] = [5]
    """Ranks k of precision@k."""
    map: list[Positive] = [5]
    """Ranks k of map@k."""
    bootstrap: Bootstrap = Bootstrap()
    """Confidence intervals."""

    @property
    def names(self) -> list[str]:
        """Every metric as `family.k`."""
        families = {"cmc": self.cmc, "precision": self.precision, "map": self.map}
        return [f"{family}.{k}" for family, ranks in families.items() for k in ranks]

    @property
    def largest_rank(self) -> int:
        """How many neighbors the metrics need."""
        return max([1, *self.cmc, *self.precision, *self.map])


class Pictures(Node):
    queries: NonNegative = 12
    """Queries shown among the worst, and again as a random choice."""
    neighbors: Positive = 6
    """Neighbors shown for each."""


class Evaluation(Node):
    embed: Embed = Embed()
    """How images become embeddings."""
    gallery: Gallery = Gallery()
    """How neighbors are searched."""
    rerank: Annotated[list[None], Field(max_length=0)] = []
    """Re-rankers, applied in order; empty: none."""
    metrics: Metrics = Metrics()
    """What is computed from them."""
    pictures: Pictures = Pictures()
    """What the report shows of them."""


class CheckpointSource(Node):
    checkpoint: Annotated[str, Field(min_length=1)]
    """Checkpoint folder of a run, or its `best` or `last`."""


class ExtractorSource(Node):
    extractor: Extractor
    """An extractor that was not trained here."""
    size: Positive
    """Side of the images it gets, in pixels."""
