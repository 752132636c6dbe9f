"""World size does not change the mathematics, and any step can be resumed at any world size (plain gloo processes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Gloo, case, difference
from safetensors.torch import load_file

SGD = {"name": "sgd", "lr": 0.05, "options": {"momentum": 0.9}}

VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "fp64_hard_adamw": ({}, 1e-10),
    "fp64_all_soft_sgd_clip": (
        {
            "criterion": {"name": "triplet", "margin": None, "miner": {"name": "all"}},
            "optimizer": SGD,
            "training": {"epochs": 2, "precision": "fp64", "clip_grad_norm": 0.05},
        },
        1e-10,
    ),
    "fp64_freeze": ({"training": {"epochs": 2, "precision": "fp64", "freeze_epochs": 1}}, 1e-10),
    # In the first epoch the sharded head learns alone: there is nothing for DDP to average.
    "fp64_freeze_sharded": (
        {
            "extractor": {"embedding_dim": None},
            "criterion": {"name": "arcface", "head": {"sharded": True}},
            "training": {"epochs": 2, "precision": "fp64", "freeze_epochs": 1, "clip_grad_norm": 0.5},
        },
        1e-10,
    ),
    # Large steps amplify the last bits of float32 in any implementation: this one is of a size people train with.
    "fp32_sgd": ({"optimizer": {"name": "sgd", "lr": 0.01}, "training": {"epochs": 2, "precision": "fp32"}}, 1e-5),
    "fp32_adamw": ({"training": {"epochs": 2, "precision": "fp32"}}, 1e-3),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world_size")


def test_any_world_size_trains_the_same_parameters(small_table: Path, workplace: Path, gloo: Gloo) -> None:
    for world_size in (1, 2, 3, 4):
        gloo(
            world_size,
            [case(small_table, workplace, f"{name}_{world_size}", **nodes) for name, (nodes, _) in VARIANTS.items()],
        )
    for name, (_, tolerance) in VARIANTS.items():
        alone = workplace / f"{name}_1.safetensors"
        for world_size in (2, 3, 4):
            assert difference(alone, workplace / f"{name}_{world_size}.safetensors") < tolerance, (name, world_size)
            rows, others = (
                json.loads((workplace / f"{name}_{w}.safetensors.json").read_text()) for w in (1, world_size)
            )
            if "fp64" in name:  # losses and metrics too
                assert [row.keys() for row in rows] == [row.keys() for row in others]
                for row, other in zip(rows, others, strict=True):
                    assert row == pytest.approx(other, abs=1e-9), name


def test_training_moves_the_parameters(small_table: Path, workplace: Path, gloo: Gloo) -> None:
    """Guards the tests above: equal parameters would be worth nothing if none of them moved."""
    one_step = case(small_table, workplace, "short", training={"epochs": 1, "precision": "fp64"})
    long = case(small_table, workplace, "long", training={"epochs": 2, "precision": "fp64"})
    gloo(1, [one_step, long])
    assert difference(Path(one_step["result"]), Path(long["result"])) > 1e-3


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_killed_run_continues_at_another_world_size(
    small_table: Path, tmp_path: Path, gloo: Gloo, before: int, after: int
) -> None:
    """Killed after step 3, 5 and 7 of 8 (odd ones), checkpointing every 2 steps: the end is that of an unbroken run."""
    nodes: dict[str, Any] = {"checkpoint": {"metric": "cmc.1", "every_steps": 2}}
    unbroken = case(small_table, tmp_path, "unbroken", **nodes)
    gloo(1, [unbroken])
    stops = (3, 5, 7)
    gloo(before, [case(small_table, tmp_path, f"killed_{stop}", stop, **nodes) for stop in stops])
    continued = [case(small_table, tmp_path, f"killed_{stop}", **nodes) for stop in stops]
    gloo(after, continued)
    expected = json.loads(Path(unbroken["result"] + ".json").read_text())
    for resumed in continued:
        assert difference(Path(unbroken["result"]), Path(resumed["result"])) < 1e-10
        rows = json.loads(Path(resumed["result"] + ".json").read_text())
        assert [(row["kind"], row["epoch"], row["step"]) for row in rows] == [
            (row["kind"], row["epoch"], row["step"]) for row in expected
        ]
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-9)


def test_killed_twice_with_batch_statistics(small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    """On one rank batch statistics and dropout resume exactly, too."""
    nodes: dict[str, Any] = {
        "extractor": {"name": "timm", "model": "test_resnet"},
        "checkpoint": {"metric": "cmc.1", "every_steps": 1},
    }
    unbroken, killed = case(small_table, tmp_path, "a", **nodes), case(small_table, tmp_path, "b", **nodes)
    gloo(1, [unbroken, {**killed, "stop_after": 3}, {**killed, "stop_after": 2}, killed])
    assert difference(Path(unbroken["result"]), Path(killed["result"])) < 1e-10
    assert torch.isfinite(next(iter(load_file(killed["result"]).values()))).all()
