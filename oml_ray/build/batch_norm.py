"""Check of batch norm: in training it needs more than one value per channel for its statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from oml_ray.config import TrainConfig, nodes
from oml_ray.data.plan import slice_bounds
from oml_ray.errors import ConfigError
from oml_ray.learning.learner import Learner
from oml_ray.learning.pair_learner import PairLearner

NAMED = 3


def check_batch_norm(config: TrainConfig, learner: Learner | PairLearner) -> None:
    """Check that no forward pass of a training gives a batch norm a single value per channel.

    Args:
        config: the training.
        learner: its learner, whose batch statistics this changes.

    Raises:
        ConfigError: a worker embeds one image (or pair) at a time, and layers in it need more.
    """
    training, sizes = config.training, forward_sizes(config)
    if 1 not in sizes:
        return
    learner.extractor.freeze_backbone(training.freeze_epochs >= training.epochs)
    names = _norms_of_one_value(learner, config.transforms.train.size)
    learner.extractor.freeze_backbone(False)
    if not names:
        return
    what = "pair" if isinstance(learner, PairLearner) else "image"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise ConfigError(
        f"training.micro_batch: {training.micro_batch or 'null'} and scaling.num_workers: {config.scaling.num_workers} "
        f"have a worker embed 1 {what} at a time, of which batch norm in training ({', '.join(names[:NAMED])}{more}) "
        "gets one value per channel, but needs at least 2: set training.freeze_statistics: true (for pretrained "
        f"weights), a training.micro_batch that leaves no rest of 1 {what}, fewer scaling.num_workers, or a larger "
        "batch (sampler)."
    )


def forward_sizes(config: TrainConfig) -> set[int]:
    """Collect how many images (or pairs) the forward passes of a training see at once, on any number of workers."""
    sampler, chunk = config.sampler, config.training.micro_batch
    total = sampler.batch_size
    if isinstance(sampler, nodes.HardPairsSampler):
        total, chunk = sampler.n_pairs, None if chunk is None else max(1, chunk // 2)
    sizes: set[int] = set()
    for world_size in range(config.scaling.least_workers, config.scaling.most_workers + 1):
        for size in np.diff(slice_bounds(total, world_size)).tolist():
            chunks = [size] if chunk is None or size <= chunk else [chunk, size % chunk or chunk]
            sizes.update(chunks)
    return sizes


@torch.no_grad()
def _norms_of_one_value(learner: Learner | PairLearner, size: int) -> list[str]:
    """Names of the batch norms that see one value per channel when the model sees one image (or pair) in training."""
    model, names = learner.extractor.train(), []
    norms = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
    }
    if not norms:
        return []

    def note(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            names.append(name)

    hooks = [
        part.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs)) for name, part in norms.items()
    ]
    images = torch.zeros(2 if isinstance(learner, PairLearner) else 1, 3, size, size, dtype=torch.uint8)
    try:
        model.forward(images)  # not by __call__, which torch.compile may have replaced
    except ValueError:
        if not names:  # torch refuses a batch norm of one value
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return names
