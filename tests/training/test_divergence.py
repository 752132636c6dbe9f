"""Weights that an update breaks are never saved, and the run goes on from its last good checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Gloo, case, train_config
from safetensors.torch import load_file

from oml_ray import build
from oml_ray.config import TrainConfig, validate
from oml_ray.errors import RunError
from oml_ray.training.context import LocalContext
from oml_ray.training.divergence import not_finite
from oml_ray.training.loop import Loop
from oml_ray.training.run_directory import RunDirectory

QUIET: dict[str, Any] = {"validation": {"every": 0, "at_start": False}}


def loop(table: Path, folder: Path, **nodes: Any) -> Loop:
    config = validate(TrainConfig, train_config(table, folder, **{**QUIET, **nodes}), "test")
    rows = build.table(config.data, config.run.storage)
    stream = build.local_stream(config, rows)
    run = RunDirectory(config.run.storage, config.run.name)
    return build.loop(config, rows, stream.plan, LocalContext(stream), run)


def break_after_update(trained: Loop, step: int, weights: Callable[[Loop], torch.Tensor], value: float) -> None:
    """Put a value that is not finite into weights as the update of a step, counted from 1, would."""
    steps = iter(range(1, step + 1))

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if next(steps, 0) == step:
            weights(trained).data.view(-1)[0] = value

    trained.updates.optimizer.register_step_post_hook(hook)


WEIGHTS: dict[str, tuple[dict[str, Any], Callable[[Loop], torch.Tensor]]] = {
    "extractor": ({}, lambda trained: next(trained.learner.extractor.parameters())),
    "criterion": ({"criterion": {"name": "arcface"}}, lambda trained: next(trained.learner.criterion.parameters())),
    "sharded head": (
        {"criterion": {"name": "arcface", "head": {"sharded": True}}},
        lambda trained: trained.updates.head.weight,
    ),
    "moving average": (
        {"training": {"epochs": 2, "precision": "fp64", "ema": {"decay": 0.9}}},
        lambda trained: next(trained.updates.average.averaged.parameters()),
    ),
    "batch statistics": (
        {"extractor": {"model": "test_resnet"}},
        lambda trained: next(b for name, b in trained.learner.named_buffers() if name.endswith("running_var")),
    ),
}


@pytest.mark.parametrize("step", [6, 8])  # at a checkpoint in the middle of an epoch, and at the end of one
@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_not_finite_is_not_saved(small_table: Path, tmp_path: Path, kind: str, step: int) -> None:
    nodes, weights = WEIGHTS[kind]
    broken = loop(small_table, tmp_path, checkpoint={"every_steps": 2}, **nodes)
    break_after_update(broken, step, weights, torch.nan if step == 6 else torch.inf)
    with pytest.raises(RunError) as raised:
        broken.train()
    message = str(raised.value)
    assert message.startswith(f"The parameters are not finite after step {step} (")
    assert "lower optimizer.lr (now 0.001), or set training.clip_grad_norm." in message
    assert "--set optimizer.lr=0.0001 'run.allow_changes=[optimizer.lr]'" in message
    last = f"step_{step - 2:08d}"
    assert message.endswith(f"continue from its last good checkpoint, {last}.")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "last").read_text() == last
    assert not (checkpoints / f"step_{step:08d}").exists()
    resumed = loop(small_table, tmp_path, checkpoint={"every_steps": 2}, **nodes)
    resumed.train()
    saved = load_file(checkpoints / "step_00000008" / "extractor.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_weights_are_checked_before_they_are_validated(small_table: Path, tmp_path: Path) -> None:
    broken = loop(small_table, tmp_path, validation={"every": 1, "at_start": False})
    break_after_update(broken, 4, lambda trained: next(trained.learner.extractor.parameters()), torch.nan)
    with pytest.raises(RunError, match=r"not finite after step 4 .* from the beginning: nothing is saved yet\.$"):
        broken.train()


def test_an_infinite_constant_of_a_network_is_no_divergence(small_table: Path, tmp_path: Path) -> None:
    """Such as the mask of an attention: it is infinite from the start."""
    trained = loop(small_table, tmp_path)
    trained.learner.extractor.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    rebuilt = type(trained.updates)(
        trained.learner, trained.updates.optimizer, trained.updates.factor, device=torch.device("cpu")
    )
    assert rebuilt.not_finite() == []
    trained.learner.extractor.projection[0].weight.data[0, 0] = torch.inf
    assert rebuilt.not_finite() == ["extractor.projection.0.weight"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_not_finite_finds_each_kind_and_no_large_number(value: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    matrix = torch.zeros(3, 5, dtype=dtype)
    matrix[2, 4] = value
    tensors = {
        "large": torch.full((1000,), largest, dtype=dtype),
        "empty": torch.empty(0, dtype=dtype),
        "scalar": torch.tensor(value, dtype=dtype),
        "one of many": matrix,
        "counter": torch.tensor([1]),
    }
    assert not_finite(tensors) == ["scalar", "one of many"]


def test_all_ranks_end_when_one_has_a_broken_shard(small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    """Rank 1 alone holds the proxies that are broken: rank 0 must neither save nor wait for it."""
    nodes = {**QUIET, "criterion": {"name": "arcface", "head": {"sharded": True}}}
    broken = case(small_table, tmp_path, "broken", **nodes)
    gloo(2, [{**broken, "broken_shard_of_rank": 1}])
    error = json.loads(Path(broken["result"] + ".error.json").read_text())
    assert error.startswith("The parameters are not finite after step 4 (sharded_head.weight)")
    assert not (tmp_path / "broken" / "checkpoints").exists()
