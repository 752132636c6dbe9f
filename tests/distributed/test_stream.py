"""Ray streams deliver, bit for bit and in order, what a plain process loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
from helpers import train_config

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.data.plan import slice_bounds
from oml_ray.distributed.stream import RayStream, ahead
from oml_ray.training.context import LocalStream

pytestmark = pytest.mark.usefixtures("ray_session")

EPOCHS = 3


@pytest.fixture(scope="module")
def local(small_table: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStream:
    folder = tmp_path_factory.mktemp("stream")
    config = validate(TrainConfig, train_config(small_table, folder), "test")
    return build.local_stream(config, build.table(config.data, str(folder)))


@pytest.mark.parametrize(("world_size", "epoch", "step"), [(1, 0, 0), (2, 1, 3), (4, 0, 2)])
@pytest.mark.parametrize("steps_per_dataset", [1000, 5])
def test_slices_of_all_ranks_make_the_planned_batches(
    local: LocalStream,
    world_size: int,
    epoch: int,
    step: int,
    steps_per_dataset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From any step to the end, over the ends of epochs, uneven slices (15 instances over 2 and 4 ranks) included."""
    monkeypatch.setattr("oml_ray.distributed.stream.STEPS_PER_DATASET", steps_per_dataset)
    loaders = ray.put((local.training_loader, local.evaluation_loader))
    bounds = slice_bounds(local.plan.batch_size, world_size)
    expected = list(local.training(epoch, step, EPOCHS))
    for rank in range(world_size):
        stream = RayStream(local.plan, loaders, rank, world_size, data_cpus=1)
        found = list(stream.training(epoch, step, EPOCHS))
        assert [(item.epoch, item.step) for item in found] == [(item.epoch, item.step) for item in expected]
        for item, whole in zip(found, expected, strict=True):
            part = slice(bounds[rank], bounds[rank + 1])
            np.testing.assert_array_equal(item.batch.ids, whole.batch.ids[part])
            np.testing.assert_array_equal(item.batch.images, whole.batch.images[part])


def test_evaluation_keeps_the_order_and_the_last_rows(local: LocalStream) -> None:
    loaders = ray.put((local.training_loader, local.evaluation_loader))
    stream = RayStream(local.plan, loaders, 0, 1, data_cpus=1)
    ids = local.training_loader.reader.table.validation_ids
    found, expected = list(stream.evaluation(ids, 7)), list(local.evaluation(ids, 7))
    assert [len(batch.ids) for batch in found] == [7, 7, 7, 3]
    for batch, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.ids, other.ids)
        np.testing.assert_array_equal(batch.images, other.images)
    assert list(stream.evaluation(ids[:0], 7)) == []


def test_ahead_is_bounded_and_passes_errors_on() -> None:
    made: list[int] = []

    def produce():  # type: ignore[no-untyped-def]
        for number in range(100):
            made.append(number)
            yield number
        raise KeyError("the end")

    items = ahead(produce, 4)
    assert next(items) == 0
    assert len(made) <= 1 + 4 + 2, "what waits in the queue, one in hand on either side"
    with pytest.raises(KeyError, match="the end"):
        list(items)
