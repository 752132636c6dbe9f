"""Every criterion, the bank, micro-batches, averages and sharded heads: the same parameters at any world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Gloo, case, difference

ONE_EPOCH = {"epochs": 1, "precision": "fp64"}
BANK = {"size_in_batches": 2}
RANDOM = {"name": "random", "batch_size": 15}
SHARDED = {"name": "arcface", "head": {"sharded": True}}
SAMPLED = {"name": "cosface", "head": {"sharded": True, "sample_rate": 0.4}}

FAMILIES: dict[str, dict[str, Any]] = {
    "contrastive_bank": {"criterion": {"name": "contrastive", "bank": BANK}},
    "sharded_sampled": {"criterion": SAMPLED, "training": {**ONE_EPOCH, "clip_grad_norm": 0.05}},
    "micro_batch": {"training": {**ONE_EPOCH, "micro_batch": 2}},
    "statistics_frozen_ema": {
        "extractor": {"name": "timm", "model": "test_resnet", "pooling": "gem", "embedding_dim": None},
        "training": {**ONE_EPOCH, "freeze_statistics": True, "ema": {"decay": 0.9}},
    },
}
REST: dict[str, dict[str, Any]] = {
    "triplet_bank": {"criterion": {"name": "triplet", "margin": 0.2, "miner": {"name": "all"}, "bank": BANK}},
    "multi_similarity_bank": {
        "criterion": {"name": "multi_similarity", "miner": {"name": "multi_similarity"}, "bank": BANK}
    },
    "sharded": {"criterion": SHARDED, "sampler": RANDOM},
    "sharded_sgd": {"criterion": SHARDED, "optimizer": {"name": "sgd", "lr": 0.01, "options": {"momentum": 0.9}}},
    "sharded_micro_batch_bank": {"criterion": SAMPLED, "training": {**ONE_EPOCH, "micro_batch": 3}},
    "layer_decay": {"optimizer": {"layer_decay": 0.5, "decay_norm_and_bias": False}},
    "proxy_anchor": {"criterion": {"name": "proxy_anchor"}, "optimizer": {"criterion_lr": 0.1}},
    "arcface": {"criterion": {"name": "arcface", "sub_centers": 2, "label_smoothing": 0.1}, "sampler": RANDOM},
    "cosface": {"criterion": {"name": "cosface"}, "training": {**ONE_EPOCH, "clip_grad_norm": 0.05}},
    **{
        miner: {"criterion": {"name": "triplet", "margin": 0.2, "miner": {"name": miner}}}
        for miner in ("all", "n_hard", "hard_cluster", "multi_similarity", "distance_weighted")
    },
    **{
        name: {"criterion": {"name": name}}
        for name in ("contrastive", "multi_similarity", "supcon", "ntxent", "circle", "smooth_ap")
    },
    **{name: {"criterion": {"name": name}} for name in ("surrogate_recall", "surrogate_precision")},
}


def check(variants: dict[str, dict[str, Any]], table: Path, folder: Path, gloo: Gloo, worlds: tuple[int, ...]) -> None:
    common: dict[str, Any] = {"training": ONE_EPOCH, "validation": {"at_start": False}}
    for world_size in (1, *worlds):
        gloo(
            world_size,
            [case(table, folder, f"{name}_{world_size}", **{**common, **nodes}) for name, nodes in variants.items()],
        )
    for name in variants:
        alone = folder / f"{name}_1.safetensors"
        for world_size in worlds:
            other = folder / f"{name}_{world_size}.safetensors"
            assert difference(alone, other) < 1e-10, (name, world_size)
            parts, twins = (sorted((folder / f"{name}_{w}" / "checkpoints").glob("*/head_*")) for w in (1, world_size))
            assert len(parts) == len(twins) == ("sharded" in name)
            assert all(difference(part, twin) < 1e-10 for part, twin in zip(parts, twins, strict=True)), name
            rows, others = (json.loads(Path(f"{file}.json").read_text()) for file in (alone, other))
            for row, twin in zip(rows, others, strict=True):
                assert row == pytest.approx(twin, abs=1e-9), (name, world_size)


def test_one_of_each_family(small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    check(FAMILIES, small_table, tmp_path, gloo, (3,))


@pytest.mark.slow
def test_all(small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    check({**FAMILIES, **REST}, small_table, tmp_path, gloo, (2, 4))


def test_micro_batches_change_nothing(small_table: Path, tmp_path: Path, gloo: Gloo) -> None:
    plain = case(small_table, tmp_path, "plain", training=ONE_EPOCH)
    chunks = case(small_table, tmp_path, "chunks", training={**ONE_EPOCH, "micro_batch": 4})
    gloo(1, [plain, chunks])
    assert difference(Path(plain["result"]), Path(chunks["result"])) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3)])
def test_banks_heads_and_averages_resume_at_another_world_size(
    small_table: Path, tmp_path: Path, gloo: Gloo, before: int, after: int
) -> None:
    variants: dict[str, dict[str, Any]] = {
        "bank": {"criterion": {"name": "triplet", "margin": 0.2, "miner": {"name": "hard"}, "bank": BANK}},
        "head": {"criterion": SAMPLED},
        "ema": {"training": {"epochs": 2, "precision": "fp64", "ema": {"decay": 0.9}}},
    }
    every_step: dict[str, Any] = {"checkpoint": {"metric": "cmc.1", "every_steps": 1}}
    unbroken = {name: case(small_table, tmp_path, f"{name}_whole", **every_step, **n) for name, n in variants.items()}
    gloo(1, list(unbroken.values()))
    gloo(before, [case(small_table, tmp_path, name, 3, **every_step, **n) for name, n in variants.items()])
    continued = {name: case(small_table, tmp_path, name, **every_step, **n) for name, n in variants.items()}
    gloo(after, list(continued.values()))
    for name, whole in unbroken.items():
        assert difference(Path(whole["result"]), Path(continued[name]["result"])) < 1e-10, name
        rows, others = (json.loads(Path(c["result"] + ".json").read_text()) for c in (whole, continued[name]))
        for row, twin in zip(rows, others, strict=True):
            assert row == pytest.approx(twin, abs=1e-9), name
