"""cluster/README.md: commands that Ray and oml_ray take, and a plan whose numbers follow from its formulas."""

from __future__ import annotations

import math
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
import yaml
from ray.scripts.scripts import cli

from oml_ray.config import EmbedConfig, EvaluateConfig, TrainConfig, load, nodes
from oml_ray.data.table import read_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text()
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SCHEMAS: dict[str, type[TrainConfig] | type[EmbedConfig] | type[EvaluateConfig]] = {
    "train": TrainConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
}
UNKNOWN = "…"


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """A command of Ray, as its own command line understands it."""
    command: click.Command = cli
    words = shlex.split(re.sub(r">.*", "", line) if "job submit" not in line else line)[1:]
    path = []
    while isinstance(command, click.Group):
        path.append(words.pop(0))
        command = command.commands[path[-1]]
    return " ".join(path), command.make_context(path[-1], words).params


RAY_LINES = [line for line in LINES if line.startswith("ray ")]
JOBS = [line for line in RAY_LINES if line.startswith("ray job submit")]


@pytest.mark.parametrize("line", RAY_LINES)
def test_commands_are_ones_of_ray(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, params = parsed(line)
    assert name in ("get-auth-token", "start", "up", "down", "dashboard", "job submit")
    if "cluster_config_file" in params:
        assert Path(params["cluster_config_file"]).is_file()
    if name == "start":
        assert params["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("line", JOBS)
def test_jobs_have_valid_configs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, params = parsed(line)
    assert (params["working_dir"], params["runtime_env"]) == (".", "cluster/runtime_env.yaml")
    python, script, config, flag, *overrides = params["entrypoint"]
    assert (python, flag) == ("python", "--set")
    assert Path(script).is_file()
    found = load(SCHEMAS[Path(script).stem], config, overrides)
    assert found.run.storage.startswith(("s3://", "/tmp/"))  # the working directory goes with the job


def test_every_place_has_a_job() -> None:
    assert len(JOBS) == 6


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_smallest_cluster_suffices_for_its_job(name: str) -> None:
    (line,) = [line for line in JOBS if "cpus_per_worker=8" in line]
    overrides = shlex.split(line.partition("--set")[2])
    scaling = load(TrainConfig, ROOT / "configs/train/figures.yaml", overrides).scaling
    types = yaml.safe_load((ROOT / f"cluster/launcher/{name}.yaml").read_text())["available_node_types"].values()
    have = {
        resource: sum(node.get("min_workers", 1) * node["resources"].get(resource, 0) for node in types)
        for resource in ("CPU", "GPU")
    }
    assert have["CPU"] >= scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus
    assert have["GPU"] >= scaling.num_workers


def test_kubernetes_cluster_suffices_for_its_job() -> None:
    spec = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.yaml").read_text())["spec"]
    overrides = shlex.split(spec["entrypoint"])[4:]
    scaling = load(TrainConfig, ROOT / "configs/train/figures.yaml", overrides).scaling
    assert any(shlex.split(line)[-len(overrides) :] == overrides for line in JOBS)  # the README's of the RayCluster
    have = {"cpu": 0, "nvidia.com/gpu": 0}
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for resource in have:
            have[resource] += group["minReplicas"] * int(limits.get(resource, 0))
    assert have["cpu"] >= scaling.num_workers * scaling.cpus_per_worker + scaling.data_cpus
    assert have["nvidia.com/gpu"] >= scaling.num_workers


def test_files_of_the_table_are_all_files() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", README.partition("What holds")[0], re.MULTILINE)
    named: set[str] = set()
    for row in rows:
        first, *more = re.findall(r"`([^`]*)`", row)
        named |= {first, *(str(Path(first).parent / name) for name in more)}
    others = {"README.md", "Dockerfile.dockerignore", "launcher/requirements.txt"}
    folder = ROOT / "cluster"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert named | others == files


# The plan

PLAN = README.partition("## On paper")[2]
CONSTANTS = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| ([^ |]+) \|", PLAN, re.MULTILINE))
KINDS = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| [^ |]+ \| (\w+) \|", PLAN, re.MULTILINE))
ROWS = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([^`]+)` \| ([^ |]+) \|$", PLAN, re.MULTILINE)


def known() -> dict[str, float]:
    return {name: float(value) for name, value in CONSTANTS.items() if value != UNKNOWN}


def test_the_plan_is_read() -> None:
    assert len(ROWS) >= 25
    assert set(KINDS.values()) == {"choice", "code", "assumption", "measured"}
    assert {name for name in KINDS if name.startswith("MEASURED")} == {
        name for name, kind in KINDS.items() if kind == "measured"
    }
    used = {name for _, _, formula, _ in ROWS for name in re.findall(r"[A-Z][A-Z0-9_]+", formula)}
    assert used == set(CONSTANTS)


@pytest.mark.parametrize(("quantity", "unit", "formula", "value"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_numbers_follow_from_the_formulas(quantity: str, unit: str, formula: str, value: str) -> None:
    names = set(re.findall(r"[A-Z][A-Z0-9_]+", formula))
    if names - set(known()):
        assert value == UNKNOWN  # as long as something that it needs is not measured
        return
    result = eval(formula, {"__builtins__": {}, "min": min, "max": max}, known())
    expected = f"{quantity}: write {result:.3g} {unit}, not {value}"
    assert value != UNKNOWN, expected
    assert math.isclose(float(value.replace(",", "")), result, rel_tol=0.006), expected


def test_constants_of_the_code_are_the_codes() -> None:
    stream = (ROOT / "oml_ray/distributed/stream.py").read_text()
    for name in ("BATCHES_PER_TASK", "BATCHES_AHEAD"):
        (value,) = re.findall(rf"^{name} = (\d+)$", stream, re.MULTILINE)
        assert known()[name] == int(value)
    (waiting,) = re.findall(r"^HELD = BATCHES_AHEAD \+ (\d+) \* BATCHES_PER_TASK$",
                            (ROOT / "jobs/benchmarks/input.py").read_text(), re.MULTILINE)  # fmt: skip
    assert known()["BLOCKS_WAITING"] == int(waiting)
    assert known()["ROWS_PER_PART"] == nodes.Embed().rows_per_part


def test_a_row_of_the_table_weighs_what_the_plan_says(tmp_path: Path) -> None:
    num = 20_000
    rows = np.arange(num)
    paths = [f"images/{row // 1000:05d}/{row:012d}.jpg" for row in rows]
    columns = {"label": rows // 4, "path": paths, "is_query": rows % 4 == 0, "is_gallery": rows % 4 > 0}
    table = pd.DataFrame({**columns, "split": "validation"})
    table.to_parquet(tmp_path / "df.parquet")
    found = read_table(str(tmp_path / "df.parquet"), None)
    assert len(paths[0]) == 29
    assert len(pickle.dumps(found, protocol=5)) / num == pytest.approx(known()["TABLE_ROW"], rel=0.05)
