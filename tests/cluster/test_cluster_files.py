"""All files of cluster/: no secrets, no downloads; the Dockerfile's rules; what `ray job submit` uploads."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def by_name(path: Path) -> str:
    return path.stem


FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
HOSTS = {
    "127.0.0.1:8265",
    "169.254.169.254",  # AWS's metadata service
    "metadata.google.internal",
    "www.googleapis.com",  # of the name of a scope
}


def test_no_file_holds_a_secret_or_fetches_from_elsewhere() -> None:
    for path in FILES:
        text = path.read_text()
        without_digests = re.sub(r"@sha256:[0-9a-f]{64}", "", text)
        assert not re.search(r"[0-9a-fA-F]{32,}", without_digests), path
        assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", text), path
        assert not re.search(r"(BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16})", text), path
        assert set(re.findall(r"https?://([^/\s\"'`)]+)", text)) <= HOSTS, path


def tokens(node: Any) -> Iterator[Any]:
    """Environment variables of any object that could be the token."""
    if isinstance(node, list):
        for item in node:
            yield from tokens(item)
    elif isinstance(node, dict):
        if "TOKEN" in str(node.get("name", "")) and "value" in node:
            yield node
        for item in node.values():
            yield from tokens(item)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=by_name)
def test_no_yaml_gives_a_token_as_a_value(path: Path) -> None:
    assert list(tokens(list(yaml.safe_load_all(path.read_text())))) == []


def test_a_token_as_a_value_would_be_found() -> None:
    leaking = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())
    leaked = {"name": "RAY_AUTH_TOKEN", "value": "x"}
    groups = leaking["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups[0]["template"]["spec"]["containers"][0]["env"].append(leaked)
    assert leaked in list(tokens(leaking))


def test_lines_are_short() -> None:
    for path in FILES:
        if path.suffix != ".md":
            assert max(map(len, path.read_text().splitlines())) <= 120, path


# The Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with what follows them, continued lines joined."""
    lines = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions by the name of their stage, FROM among them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions(text):
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        found[name].append((word, rest))
    return found


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    found, by_stage = [], stages(text)
    for name, steps in by_stage.items():
        base = steps[0][1].split(" AS ")[0]
        if base not in by_stage and not re.fullmatch(r"[a-z]+:[0-9][^@]*@sha256:[0-9a-f]{64}", base):
            found.append(f"{name}: base image without version and digest")
        users = [rest for word, rest in steps if word == "USER"]
        if name in ("runtime", "launcher") and users[-1:] != ["ray"]:
            found.append(f"{name}: runs as root")
        for word, rest in steps:
            if word == "ADD":
                found.append(f"{name}: ADD")
            if word in ("ARG", "ENV") and re.search(r"TOKEN|SECRET|PASSWORD|KEY", rest):
                found.append(f"{name}: secret in {word}")
            if word == "RUN" and re.search(r"\b(curl|wget|sudo|git)\b", rest):
                found.append(f"{name}: fetches or elevates")
            if word == "RUN" and "apt-get install" in rest:
                if "--no-install-recommends" not in rest or "rm -rf /var/lib/apt/lists/*" not in rest:
                    found.append(f"{name}: apt-get leaves things behind")
                if not rest.startswith("apt-get update &&"):
                    found.append(f"{name}: apt-get with an old list")
            if word == "RUN" and "pip install" in rest and not re.search(r"--constraint|--no-deps", rest):
                found.append(f"{name}: pip without pins")
            if word == "COPY" and rest.split()[0] == ".":
                found.append(f"{name}: copies everything")
    words = [rest for steps in by_stage.values() for word, rest in steps if word == "COPY"]
    pins = next((place for place, rest in enumerate(words) if "constraints.txt" in rest), len(words))
    code = next((place for place, rest in enumerate(words) if "oml_ray" in rest.split()), -1)
    if pins > code:
        found.append("the code is copied before the pins")
    return found


DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_dockerfile_follows_the_rules() -> None:
    assert list(stages(DOCKERFILE)) == ["python", "build", "runtime", "launcher"]
    assert complaints(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("FROM python:3.11.14-slim-bookworm@sha256:65", "FROM python:latest@sha256:65", "python: base image"),
        ("@sha256:65a93d69", "", "python: base image"),
        ("USER ray\n\n", "\n", "runtime: runs as root"),
        ("COPY configs configs", "ADD configs configs", "runtime: ADD"),
        ("ARG UID=1000", "ARG AUTH_TOKEN", "runtime: secret in ARG"),
        ("RUN pip install", "RUN curl -o x y && pip install", "build: fetches"),
        (" --no-install-recommends g++", " g++", "build: apt-get leaves"),
        ("--constraint constraints.txt", "", "build: pip without pins"),
        ("COPY jobs jobs", "COPY . .", "runtime: copies everything"),
        ("COPY constraints.txt pyproject.toml ./", "COPY oml_ray oml_ray", "the code is copied before"),
    ],
)
def test_broken_rules_would_be_found(old: str, new: str, complaint: str) -> None:
    assert DOCKERFILE.count(old) >= 1
    assert any(found.startswith(complaint) for found in complaints(DOCKERFILE.replace(old, new, 1)))


def test_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = set()
    for word, rest in instructions(DOCKERFILE):
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_image_needs_a_token() -> None:
    settings = [
        setting for word, rest in stages(DOCKERFILE)["runtime"] if word == "ENV" for setting in shlex.split(rest)
    ]
    assert "RAY_AUTH_MODE=token" in settings
    assert "HOME=/home/ray" in settings  # Ray's launcher asks the image for it


def test_image_has_the_compiler_of_torch_compile() -> None:
    (packages,) = [rest for word, rest in stages(DOCKERFILE)["runtime"] if word == "RUN" and "apt-get install" in rest]
    assert "g++" in packages.split()


def test_image_gets_the_projects_dependencies() -> None:
    (step,) = [rest for word, rest in stages(DOCKERFILE)["build"] if word == "RUN" and "tomllib" in rest]
    command = step.partition(" > requirements.txt")[0].replace("python", shlex.quote(sys.executable), 1)
    listed = subprocess.run(["sh", "-c", command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for extra in ("hnsw", "lite", "pml") for need in project["optional-dependencies"][extra]]
    assert listed.splitlines() == [*project["dependencies"], *extras, "setuptools"]


def test_launchers_requirements_are_pinned() -> None:
    lines = (CLUSTER / "launcher" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", pin) for pin in pins)


# Uploads


def uploaded(folder: Path, target: Path) -> set[str]:
    """What `ray job submit --working-dir FOLDER --runtime-env cluster/runtime_env.yaml` uploads."""
    excludes = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())["excludes"]
    create_package(
        str(folder), target, include_gitignore=True, excludes=[*get_runtime_env_default_excludes(), *excludes]
    )
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_runtime_env_leaves_data_out(tmp_path: Path) -> None:
    code = ["jobs/train.py", "configs/train/mine.yaml", "oml_ray/data/table.py", "oml_ray/retrieval/report/page.js",
            "mine.yaml"]  # fmt: skip
    data = ["df.csv", "images/1.jpg", "data/2.png", "runs/figures/metrics.json", "oml_ray/weights.pth", "jobs/df.csv",
            "configs/table.parquet", ".git/config", ".venv/bin/python", "oml_ray/__pycache__/x.pyc", "notes.txt",
            "embeddings.npy", ".ray/auth_token", "tests/test.py"]  # fmt: skip
    for name in [*code, *data]:
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert uploaded(tmp_path / "work", tmp_path / "package.zip") == set(code)


def test_repository_uploads_little(tmp_path: Path) -> None:
    names = uploaded(ROOT, tmp_path / "package.zip")
    assert {"jobs/train.py", "configs/train/figures.yaml", "oml_ray/cli.py"} <= names
    assert {name.split("/")[0] for name in names} == {"jobs", "configs", "oml_ray"}
    assert (tmp_path / "package.zip").stat().st_size < 2_000_000
