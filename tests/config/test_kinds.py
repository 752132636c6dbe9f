"""Configs of any verb: the verb that a file belongs to, and the given keys that it does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from oml_ray.cli import main
from oml_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    SearchConfig,
    SweepConfig,
    TrainConfig,
    apply_overrides,
    load_any,
    unused_keys,
    validate,
)
from oml_ray.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml"))
RUN: dict[str, Any] = {"run": {"name": "r"}}
IMAGES = {**RUN, "data": {"table": "t.csv"}, "source": {"checkpoint": "c"}}
STORE = {**RUN, "source": {"store": "s"}}
SEARCH = {**RUN, "source": {"checkpoint": "c"}, "queries": "q", "gallery": "g"}
TRAIN: dict[str, Any] = {
    **RUN,
    "data": {"table": "t.csv"},
    "transforms": {"train": {"name": "resize", "size": 32}, "eval": {"name": "resize", "size": 32}},
    "extractor": {"name": "timm", "model": "test_vit"},
    "criterion": {"name": "triplet", "margin": 0.2, "miner": {"name": "hard"}},
    "sampler": {"name": "balance", "n_labels": 4, "n_instances": 4},
}
SWEEP: dict[str, Any] = {**RUN, "base": TRAIN, "space": {"criterion.margin": {"uniform": [0.1, 0.5]}}}
SWEEP["tune"] = {"num_samples": 2}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_configs_are_of_their_verb_and_use_all_their_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[2])
    config, verb = load_any(path), path.parent.name
    kinds = {
        "train": TrainConfig, "embed": EmbedConfig, "evaluate": (EmbedConfig, EvaluateConfig),
        "search": SearchConfig, "sweep": SweepConfig,
    }  # fmt: skip
    assert isinstance(config, kinds[verb])  # type: ignore[arg-type]
    if verb == "evaluate":  # with images it cannot be told from a config of embed
        config = validate(EvaluateConfig, yaml.safe_load(path.read_text()), str(path))
    assert unused_keys(config) == []


@pytest.mark.parametrize(
    ("tree", "overrides", "kind"),
    [
        (TRAIN, [], TrainConfig),
        (IMAGES, [], EmbedConfig),
        (STORE, [], EvaluateConfig),
        ({**IMAGES, "source": {"embeddings": "e.npy"}}, [], EvaluateConfig),
        (RUN, ["source.store=s"], EvaluateConfig),
        (SEARCH, [], SearchConfig),
        (SWEEP, [], SweepConfig),
        ({**SWEEP, "base": {**TRAIN, "seed": 1}}, ["base.seed=2"], SweepConfig),
    ],
)
def test_a_config_is_checked_as_that_of_its_verb(
    tree: dict[str, Any], overrides: list[str], kind: type, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert type(load_any(tmp_path / "config.yaml", overrides)) is kind


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({**SEARCH, "k": 0}, r"k: should be greater than 0"),
        ({**SWEEP, "space": {"criterion.margins": {"uniform": [0.1, 0.5]}}}, "margins"),
        ({**STORE, "evaluation": {"metrics": {"cmc": [0]}}}, "evaluation.metrics.cmc"),
        ({**IMAGES, "sampler": {}}, "unknown key 'sampler'"),
        ({**TRAIN, "sampler": {"name": "none"}}, "sampler.name"),
    ],
)
def test_what_is_wrong_is_told_in_the_keys_of_the_verb(tree: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=told):
        load_any(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("schema", "tree", "overrides", "expected"),
    [
        (EmbedConfig, IMAGES, [], []),
        (EmbedConfig, IMAGES, ["evaluation.embed.batch_size=64", "scaling.data_cpus=2", "scaling.use_gpu=true"], []),
        (
            EmbedConfig,
            IMAGES,
            ["evaluation.metrics.cmc=[1]", "evaluation.gallery.shards=3", "scaling.num_workers=2"],
            ["scaling.num_workers", "evaluation.metrics", "evaluation.gallery"],
        ),
        # A default is a wish too, where it is written down.
        (EmbedConfig, IMAGES, ["evaluation.depth=100"], ["evaluation.depth"]),
        (EvaluateConfig, IMAGES, ["evaluation.embed.batch_size=64", "evaluation.gallery.shards=1"], []),
        (EvaluateConfig, IMAGES, ["scaling.cpus_per_worker=2", "evaluation.depth=9"],
         ["scaling.cpus_per_worker", "evaluation.depth"]),
        (EvaluateConfig, IMAGES, ["evaluation.depth=9", "evaluation.rerank=[{name: csls}]"], []),
        (EvaluateConfig, STORE, ["evaluation.embed.actors=2", "scaling.data_cpus=2", "scaling.gpu.embedding=true"],
         ["evaluation.embed", "scaling.data_cpus", "scaling.gpu.embedding"]),
        (EvaluateConfig, STORE, ["evaluation.embed.actors=2", "evaluation.rerank=[{name: pairwise, checkpoint: c}]"],
         []),
        (SearchConfig, SEARCH, ["evaluation.gallery.shards=1", "evaluation.pictures.queries=2", "k=3"], []),
        (SearchConfig, SEARCH, ["evaluation.metrics.map_r=true", "evaluation.neighbors=true"],
         ["evaluation.neighbors", "evaluation.metrics"]),
        (TrainConfig, TRAIN, ["scaling.num_workers=1", "evaluation.metrics.map_r=true"], []),
        (TrainConfig, TRAIN, ["scaling.resize_every_s=30.0"], ["scaling.resize_every_s"]),
        (TrainConfig, TRAIN, ["scaling.resize_every_s=30.0", "scaling.num_workers=[1, 2]"], []),
        (SweepConfig, SWEEP, ["tune.scheduler=asha", "tune.grace_epochs=1"], []),
        (SweepConfig, SWEEP, ["tune.grace_epochs=1", "base.scaling.resize_every_s=9.0"],
         ["tune.grace_epochs", "base.scaling.resize_every_s"]),
    ],
)  # fmt: skip
def test_given_keys_that_a_verb_does_not_use_are_named(
    schema: type[Any], tree: dict[str, Any], overrides: list[str], expected: list[str]
) -> None:
    assert unused_keys(validate(schema, apply_overrides(tree, overrides), "config")) == expected


def test_a_verb_warns_once_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(IMAGES))
    arguments = ["embed", str(tmp_path / "config.yaml"), "--set", "scaling.num_workers=2", "--dry-run"]
    assert main(arguments) == 2  # there is no such table
    out, error = capsys.readouterr()
    assert out.count("warning") == 1
    assert "keys that this verb does not use: scaling.num_workers" in out
    assert "t.csv" in error


def test_check_audits_the_table_of_a_sweep_and_the_images_of_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(tree: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        status = main(["check", str(tmp_path / "config.yaml"), *arguments])
        return status, *capsys.readouterr()

    sweep = {**SWEEP, "run": {"name": "s", "storage": str(tmp_path)}}
    sweep["base"] = {**TRAIN, "data": {"table": "figures"}}
    status, out, _ = check(sweep)
    assert status == 0
    assert "queries: " in out
    assert "labels" in out
    images = tmp_path / "_figures" / "images"
    status, out, _ = check({**SEARCH, "queries": str(images)})
    assert status == 0
    count = len(list(images.glob("**/*.png"))) + len(list(images.glob("**/*.jpg")))
    assert f"{images}: {count} images to search with; they need no labels" in out
    status, _, error = check({**SEARCH, "queries": str(images)}, "--images")
    assert status == 2
    assert "need a table with labels" in error
