"""Nodes of the loop: how parameters move, what is kept, which processes do it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

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
    """Compile the backbone by torch.compile."""
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
