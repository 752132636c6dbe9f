"""Models of pairs against single pairs by hand, and the parts and switches that a training loop uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oml_ray.distances import exact_paired
from oml_ray.errors import ConfigError, EmbeddingError
from oml_ray.learning.extractors import Extractor, timm_extractor
from oml_ray.learning.losses.pairs_bce import PairsBCELoss
from oml_ray.learning.pair_learner import PairLearner
from oml_ray.learning.siamese import ConcatSiamese, LinearSiamese, PairModel, TrivialDistanceSiamese, pairs_of
from oml_ray.training.optimizers import build_optimizer


def images(num: int = 6, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 3, size, size), dtype=np.uint8))


def embeddings(seed: int, num: int, dim: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32))


def concat(model: str = "test_resnet", hidden: tuple[int, ...] = (8,)) -> ConcatSiamese:
    torch.manual_seed(0)
    return ConcatSiamese(timm_extractor(model, size=32, embedding_dim=12), hidden)


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
def test_the_two_images_are_seen_side_by_side(hidden: tuple[int, ...]) -> None:
    model = concat(hidden=hidden).eval()
    linear = [layer for layer in model.head.modules() if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [*hidden, 1]
    with torch.no_grad():
        found = model(images())
        assert found.shape == (3,)
        for logit, first, second in zip(found, images()[0::2], images()[1::2], strict=True):
            wide = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
            wide[0, :, :, :32], wide[0, :, :, 32:] = first, second
            values = model.extractor(wide)[0]
            for index, layer in enumerate(linear):
                values = layer.weight @ (values if index == 0 else values.clamp(min=0)) + layer.bias
            torch.testing.assert_close(logit, values[0], atol=1e-5, rtol=1e-5)
        swapped = images()[[1, 0, 3, 2, 5, 4]]
        assert (model(swapped) != found).any()
        torch.testing.assert_close(model.distances(images()), found.sigmoid())


def test_a_transformer_is_built_for_both_images() -> None:
    backbone = timm.create_model("test_vit", img_size=(32, 64), num_classes=0)
    extractor = Extractor(
        backbone,
        torch.nn.Identity(),
        embedding_dim=backbone.num_features,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        normalize=True,
    )
    assert ConcatSiamese(extractor, [])(images()).shape == (3,)


def test_switches_reach_the_extractor() -> None:
    model = concat("test_byobnet")
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    model.freeze_backbone(True)
    model.train()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.projection.parameters())
    assert not any(norm.training for norm in norms)
    model.freeze_backbone(False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(norm.training for norm in norms)
    model.freeze_statistics()
    model.train()
    assert not any(norm.training for norm in norms)
    with torch.no_grad():
        before = model.eval()(images())
        model.use_channels_last()
        torch.testing.assert_close(model(images()), before, atol=1e-5, rtol=1e-5)
    assert model.extractor.memory_format == torch.channels_last


@pytest.mark.parametrize("make", [concat, partial(LinearSiamese, 4)])
def test_the_parts_are_all_there_is_to_learn(make: Callable[[], PairModel]) -> None:
    model = make()
    parts = [part for part in (model.backbone, model.pooling, model.projection) if part is not None]
    listed = [id(parameter) for part in parts for parameter in part.parameters()]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    optimizer = build_optimizer(PairLearner(model, PairsBCELoss()), name="sgd", lr=0.1, weight_decay=0.0)
    moved = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(moved) == sorted(listed)
    state = copy.deepcopy(model).state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state), "nothing is kept twice"


def test_inputs_are_told() -> None:
    assert concat().inputs == "images"
    assert LinearSiamese(2).inputs == TrivialDistanceSiamese().inputs == "embeddings"
    assert not list(TrivialDistanceSiamese().parameters())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 9), st.floats(0.1, 3), st.floats(-1, 2))
def test_linear_is_the_distance_of_the_maps(seed: int, num: int, dim: int, scale: float, bias: float) -> None:
    torch.manual_seed(seed)
    model, items = LinearSiamese(dim, identity=False).double(), embeddings(seed, 2 * num, dim)
    with torch.no_grad():
        model.log_scale.fill_(np.log(scale))
        model.bias.fill_(bias)
        found = model(items).numpy()
    matrix, rows = model.linear.weight.detach().numpy(), items.double().numpy()
    expected = [
        scale * (np.linalg.norm(matrix @ x - matrix @ y) - bias) for x, y in zip(rows[::2], rows[1::2], strict=True)
    ]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-9, atol=1e-12)
    distances = model.distances(items)
    assert distances.dtype == torch.float32
    np.testing.assert_allclose(distances.numpy(), np.logaddexp(0, found), rtol=1e-6)


def test_linear_begins_with_the_order_of_the_distance() -> None:
    items = embeddings(1, 200, 16)
    before = exact_paired(items[0::2], items[1::2])
    torch.testing.assert_close(LinearSiamese(16)(items).detach(), before - 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_embeddings_have_finite_gradients(dtype: torch.dtype) -> None:
    model = LinearSiamese(3).to(dtype)
    loss, _ = PairsBCELoss()(model(torch.ones(4, 3)), torch.tensor([True, False]))
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert (model.linear.weight.grad == 0).all()


def test_autocast_keeps_the_digits_of_small_distances() -> None:
    items = embeddings(2, 8, 16)
    items[1::2] = items[0::2] + 1e-3 * items[1::2]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = LinearSiamese(16)(items) + 1
    torch.testing.assert_close(found, exact_paired(items[0::2], items[1::2]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_trivial_is_the_definition(distance: str) -> None:
    items = torch.cat([embeddings(3, 40, 7), torch.zeros(2, 7), torch.ones(2, 7)])
    model = TrivialDistanceSiamese(distance)
    expected = exact_paired(items[0::2].contiguous(), items[1::2].contiguous(), distance)
    assert expected.dtype == torch.float32
    assert torch.equal(model(items), expected)
    assert torch.equal(model.distances(items), expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(EmbeddingError, match="found 3 items; allowed is an even number"):
        pairs_of(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="distance: found 'manhattan'"):
        TrivialDistanceSiamese("manhattan")
    with pytest.raises(ValueError, match="dim must be at least 1, found 0"):
        LinearSiamese(0)
    with pytest.raises(ValueError, match=r"hidden_dims must be at least 1, found \[0\]"):
        concat(hidden=(0,))
