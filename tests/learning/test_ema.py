from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oml_ray.learning.ema import WeightAverage
from oml_ray.learning.extractors import Extractor, timm_extractor


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).double()


def disturb(module: nn.Module, generator: np.random.Generator) -> None:
    """What a step of training does: parameters move, batch statistics and counters too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.from_numpy(generator.normal(size=parameter.shape)))
    module.train()
    module(torch.from_numpy(generator.normal(size=(5, 3, 8, 8))))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.floats(0.0, 0.9999), st.booleans(), st.integers(1, 15))
def test_the_average_equals_a_naive_loop(seed: int, decay: float, warmup: bool, steps: int) -> None:
    generator, module = np.random.default_rng(seed), network()
    average = WeightAverage(module, decay=decay, warmup=warmup)
    expected = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    for step in range(1, steps + 1):
        disturb(module, generator)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        average.update()
        share = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
            if value.is_floating_point():
                expected[name] = share * expected[name] + (1 - share) * value.numpy()
            else:
                expected[name] = value.numpy().copy()
    assert expected["1.num_batches_tracked"] == steps
    for name, value in average.averaged.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_resumed_average_equals_an_uninterrupted_one() -> None:
    module = network()
    average = WeightAverage(module, decay=0.99, warmup=True)
    generator = np.random.default_rng(0)
    for _ in range(3):
        disturb(module, generator)
        average.update()
    resumed_module = network()
    resumed_module.load_state_dict(module.state_dict())
    resumed = WeightAverage(resumed_module, decay=0.99, warmup=True)
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    for _ in range(3):
        seed = int(generator.integers(999))
        for one, follower in ((module, average), (resumed_module, resumed)):
            disturb(one, np.random.default_rng(seed))
            follower.update()
    for name, value in average.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name


def test_the_state_survives_a_checkpoint(tmp_path: Path) -> None:
    average = WeightAverage(network(), decay=0.9, warmup=False)
    average.update()
    torch.save(average.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = WeightAverage(network(), decay=0.9, warmup=False)
    other.load_state_dict(state)
    assert other.num_updates == 1
    for name, value in average.averaged.state_dict().items():
        assert torch.equal(value, other.averaged.state_dict()[name])


def test_the_averaged_extractor_embeds_and_is_stored_like_the_extractor() -> None:
    extractor = timm_extractor("test_resnet", size=64, embedding_dim=8, pooling="gem")
    average = WeightAverage(extractor, decay=0.5, warmup=False)
    with torch.no_grad():
        for parameter in extractor.parameters():
            parameter.mul_(3)
    average.update()
    assert isinstance(average.averaged, Extractor)
    assert not average.averaged.training
    assert extractor.training
    assert not any(parameter.requires_grad for parameter in average.averaged.parameters())
    assert all(parameter.requires_grad for parameter in extractor.parameters())
    torch.testing.assert_close(average.averaged.pooling.p, torch.tensor([6.0]), check_dtype=False)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    stored = timm_extractor("test_resnet", size=64, embedding_dim=8, pooling="gem").eval()
    stored.load_state_dict(average.averaged.state_dict())
    with torch.no_grad():
        assert torch.equal(stored(images), average.averaged(images))


def test_frozen_weights_stay_what_they_are() -> None:
    """Not only nearly: an average of equal numbers must not drift by roundings."""
    module = nn.Linear(50, 50)
    average = WeightAverage(module, decay=0.999, warmup=True)
    for _ in range(50):
        average.update()
    assert torch.equal(average.averaged.weight, module.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        WeightAverage(nn.Linear(1, 1), decay=decay, warmup=False)
