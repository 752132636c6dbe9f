from __future__ import annotations

import copy

import pytest
import torch

from oml_ray.learning.extractors import timm_extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.losses.triplet import TripletLoss
from oml_ray.learning.miners import HardTriplets


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(10) // 2


def step(learner: Learner, images: torch.Tensor) -> None:
    learner.zero_grad()
    learner(images, LABELS, [0, len(images)])[0].backward()


@pytest.mark.parametrize("micro_batch", [1, 3, 10, 100])
def test_micro_batches_have_the_gradients_of_the_whole(images: torch.Tensor, micro_batch: int) -> None:
    whole = Learner(timm_extractor("test_vit", size=32), TripletLoss(HardTriplets(), margin=0.2)).double()
    chunked = Learner(copy.deepcopy(whole.extractor), whole.criterion, micro_batch=micro_batch)
    step(whole, images)
    step(chunked, images)
    for one, other in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_micro_batches_take_every_image_into_the_statistics_once(images: torch.Tensor) -> None:
    extractor = timm_extractor("test_byobnet", size=32)
    by_hand = copy.deepcopy(extractor)
    step(Learner(extractor, TripletLoss(HardTriplets(), margin=0.2), micro_batch=5), images)
    for chunk in images.split(5):
        by_hand(chunk)
    buffers, expected = dict(extractor.named_buffers()), dict(by_hand.named_buffers())
    assert any("running_mean" in name for name in buffers)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[name])


def test_frozen_statistics_stay_while_parameters_learn(images: torch.Tensor) -> None:
    extractor = timm_extractor("test_byobnet", size=32)
    extractor.freeze_statistics()
    extractor.freeze_backbone(True)
    extractor.freeze_backbone(False)
    before = copy.deepcopy(dict(extractor.named_buffers()))
    step(Learner(extractor, TripletLoss(HardTriplets(), margin=0.2)).train(), images)
    for name, buffer in extractor.named_buffers():
        assert torch.equal(buffer, before[name])
    assert all(parameter.grad is not None for parameter in extractor.parameters())


def test_a_micro_batch_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch must be at least 1 or None, found 0"):
        Learner(timm_extractor("test_vit", size=32), TripletLoss(HardTriplets(), margin=0.2), micro_batch=0)
