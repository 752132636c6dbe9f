"""Nodes of the loop: how parameters move, what is kept, which processes do it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from oml_ray.config.nodes.base import Node, NonNegative, Positive, Probability, Rate


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
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer of the backbone to the one before it; null: one rate for all."""
    decay_norm_and_bias: bool = True
    """Whether weight decay holds for biases and normalisations too."""
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


class Ema(Node):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Share of the old average that a step keeps; smaller in the first steps."""


class Training(Node):
    epochs: Positive = 5
    """Epochs of the plan."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the extractor: bf16 and fp16 by autocast, fp64 throughout."""
    micro_batch: Positive | None = None
    """Instances of a worker's slice whose activations are held at once, at the cost of embedding twice; null: all.
    Batch statistics that are not frozen are those of a chunk."""
    clip_grad_norm: Rate | None = None
    """Largest L2 norm of the gradient of all parameters; null: no clipping."""
    freeze_epochs: NonNegative = 0
    """First epochs in which the backbone does not learn."""
    freeze_statistics: bool = False
    """Keep the backbone's batch statistics as they came, while its parameters learn: for pretrained weights."""
    ema: Ema | None = None
    """Moving average of the weights, which is what is validated and kept; null: none."""
    channels_last: bool = False
    """Lay images and weights out with their channels last."""
    compile: bool = False
    """Compile the extractor by torch.compile, which needs a C++ compiler (g++, or what the variable CXX names) on the
    nodes of the workers, and a C compiler (gcc, or CC) for GPUs."""
    log_every: Positive = 10
    """Steps between two entries of the TensorBoard events and of the progress line."""


Stage = Literal["workers", "embedding", "gallery"]
"""Stages that may run on GPUs: the keys of `scaling.gpu`."""


class Checkpoint(Node):
    every_steps: Positive | None = None
    """Also checkpoint after every so many steps; null: at the end of epochs only."""
    metric: Annotated[str, Field(pattern=r"^[a-z_]+\.[0-9]+$")] = "cmc.1"
    """Metric that decides which checkpoint is the best."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""
    keep: Positive = 2
    """Newest checkpoints to keep, beside the best."""


class Placement(Node):
    labels: dict[Annotated[str, Field(min_length=1)], Annotated[str, Field(pattern=r"^[^!(), ]+$")]] = {}
    """Labels of nodes, with their values: only nodes that have all of them are used."""
    resources: dict[Annotated[str, Field(min_length=1)], Rate] = {}
    """Custom resources of nodes that each process (or task) takes, e.g. {big_memory: 1}."""

    @model_validator(mode="after")
    def _are_custom(self) -> Self:
        for name in ("CPU", "GPU", "memory"):
            if name in self.resources:
                raise ValueError(
                    f"resources: {name} is no custom resource: other keys of the config say how much is taken"
                )
        return self


class Placements(Node):
    workers: Placement = Placement()
    """Training processes."""
    decoding: Placement = Placement()
    """Tasks that decode images, in training and evaluation."""
    embedding: Placement = Placement()
    """Actors that embed."""
    gallery: Placement = Placement()
    """Actors that search."""


class StageGpus(Node):
    workers: bool | None = None
    """Training processes get a GPU each; null: as scaling.use_gpu says."""
    embedding: bool | None = None
    """Actors that embed, or score pairs of images, get a GPU each; null: as scaling.use_gpu says."""
    gallery: bool | None = None
    """Gallery shards search on GPUs: one each, or several on each where there are fewer GPUs than shards; indexes that
    have no GPU form stay on the CPU. null: as scaling.use_gpu says."""


class Scaling(Node):
    num_workers: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = 2
    """Training processes; [least, most]: as many as the cluster has room for; when nodes come or go, training goes on
    from its last checkpoint."""
    use_gpu: bool = False
    """Run training, embedding and gallery search on GPUs: the short form of `gpu`."""
    gpu: StageGpus = StageGpus()
    """Stages that run on GPUs, e.g. {gallery: false} where the gallery lies on nodes without GPUs."""
    cpus_per_worker: Positive = 1
    """CPUs (and compute threads) of a worker."""
    data_cpus: Positive = 1
    """CPUs for decoding, beside the workers' own."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Deaths of workers to recover from; -1: any number."""
    resize_every_s: Rate = 60
    """[least, most] workers: seconds between two looks whether the cluster has room for more."""
    placement: Placements = Placements()
    """Which nodes run what; empty: any."""
    autoscaling: bool = False
    """Whether the cluster grows when more is asked for: then what it lacks now is waited for, not refused."""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of training processes may change."""
        return isinstance(self.num_workers, list)

    @property
    def most_workers(self) -> int:
        """How many training processes there may be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def least_workers(self) -> int:
        """How many training processes there must be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    def uses_gpu(self, stage: Stage) -> bool:
        """Return whether the processes of a stage run on GPUs."""
        switch: bool | None = getattr(self.gpu, stage)
        return self.use_gpu if switch is None else switch

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers: the least must not be above the most, found {self.num_workers}")
        if self.is_elastic and self.placement.workers.labels:
            raise ValueError(
                "placement.workers.labels: Ray does not heed labels when it counts how many workers of num_workers: "
                f"{self.num_workers} there is room for: mark the nodes by a custom resource and set "
                "placement.workers.resources, e.g. {train_node: 1}"
            )
        return self


class Validation(Node):
    every: NonNegative = 1
    """Epochs between two validations; 0: none during training."""
    mode: Literal["inline", "async"] = "inline"
    """inline: the training workers validate between epochs; async: other actors validate each checkpoint (as
    `evaluation` says) while training goes on, on CPUs and GPUs beside the workers'."""
    at_start: bool = True
    """Validate before the first step: what the extractor scores untrained."""
    timeout_s: Rate = 7200.0
    """async: seconds without the result of a validation after which the training ends with a message."""
