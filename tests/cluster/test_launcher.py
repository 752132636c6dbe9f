"""Files of Ray's cluster launcher: against Ray's own schema, defaults and command line."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import yaml
from ray._private.label_utils import parse_node_labels_string, validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted((ROOT / "cluster" / "launcher").glob("*.yaml"))
CLOUDS = [path for path in LAUNCHERS if path.stem != "on_premise"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TOKEN_FILE = "/home/ray/.ray/auth_token"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def by_name(path: Path) -> str:
    return path.stem


def test_all_launchers_are_looked_at() -> None:
    assert [path.stem for path in LAUNCHERS] == ["aws", "gcp", "on_premise"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launcher_fits_rays_schema(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(path), schema)
    prepared = prepare_config(read(path))  # with Ray's defaults for what the file leaves out
    validate_config(prepared)
    assert prepared["setup_commands"] + prepared["head_setup_commands"] + prepared["worker_setup_commands"] == []


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launcher_has_token_authentication_from_a_file(path: Path) -> None:
    config = read(path)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert f"--env RAY_AUTH_TOKEN_PATH={TOKEN_FILE}" in config["docker"]["run_options"]
    assert config["file_mounts"] == {TOKEN_FILE: "~/.ray/auth_token"}


def start_commands(config: dict[str, Any], key: str) -> list[click.Context]:
    """The `ray start` of a launcher, as Ray's command line understands it."""
    commands = [line.partition(";")[2] for line in config[key] if "ray start" in line]
    words = [shlex.split(re.sub(r"\$\(.*\)", "train", command)) for command in commands]
    assert all(line[:2] == ["ray", "start"] for line in words)
    return [start.make_context("start", line[2:]) for line in words]


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launcher_starts_ray(path: Path) -> None:
    config = read(path)
    (head,) = start_commands(config, "head_start_ray_commands")
    (worker,) = start_commands(config, "worker_start_ray_commands")
    assert head.params["head"]
    assert head.params["dashboard_host"] == "127.0.0.1"
    assert head.params["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker.params["address"] == "$RAY_HEAD_IP:6379"
    if worker.params["labels"]:
        assert parse_node_labels_string(worker.params["labels"]) == {"oml-ray/role": "train"}


@pytest.mark.parametrize("path", LAUNCHERS, ids=by_name)
def test_launcher_names_the_images_of_this_version(path: Path) -> None:
    docker = read(path)["docker"]
    assert (docker["head_image"], docker["worker_image"]) == (f"oml-ray-launcher:{VERSION}", f"oml-ray:{VERSION}")


@pytest.mark.parametrize("path", CLOUDS, ids=by_name)
def test_clouds_have_workers_of_each_kind(path: Path) -> None:
    config = read(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert [node["labels"]["oml-ray/role"] for node in types.values()] == ["train", "decode", "gallery"]
    for node in types.values():
        validate_node_label_syntax(node["labels"])
        assert 0 <= node["min_workers"] <= node["max_workers"] <= config["max_workers"]
    assert sum(node["max_workers"] for node in types.values()) <= config["max_workers"]
    has_gpus = {name: node["resources"].get("GPU", 0) > 0 for name, node in types.items()}
    assert has_gpus == {"gpu": True, "decode": False, "gallery": False}
    assert types["gpu"]["max_workers"] * types["gpu"]["resources"]["GPU"] == 64
    assert types["gpu"]["docker"]["worker_run_options"] == ["--gpus all"]


def is_spot(node: dict[str, Any]) -> bool:
    config = node["node_config"]
    on_aws = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return bool(on_aws or config.get("scheduling", {}).get("provisioningModel") == "SPOT")


@pytest.mark.parametrize("path", CLOUDS, ids=by_name)
def test_spot_machines_are_watched(path: Path) -> None:
    config = read(path)
    spot = {name: is_spot(node) for name, node in config["available_node_types"].items()}
    assert spot == {"head": False, "gpu": True, "decode": True, "gallery": False}
    (watch,) = [line for line in config["worker_start_ray_commands"] if "preemption.py" in line]
    assert f"python /home/ray/oml_ray/cluster/preemption.py {path.stem} " in watch
    assert watch.endswith("&")
