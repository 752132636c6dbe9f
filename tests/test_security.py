"""What others may have made (tables, images, checkpoints, stores) executes nothing and leads nowhere.

Submitting jobs without the token is tested in tests/distributed/test_jobs.py, files of NumPy with pickled objects in
tests/retrieval/test_user_embeddings.py, and `..` in the paths of tables in tests/data/test_table.py.
"""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFile
from helpers import HEADER

from oml_ray import build
from oml_ray.config import TrainConfig, load, load_sweep
from oml_ray.data.filesystem import read_bytes
from oml_ray.data.queries import read_queries
from oml_ray.data.table import check_files_exist, read_table
from oml_ray.distributed import runs
from oml_ray.errors import CheckpointError, ConfigError, TableError
from oml_ray.learning.weights import read_weights
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import META, TRAINING, WEIGHTS, Checkpoint, Position
from oml_ray.training.run_directory import RunDirectory

FIGURES = Path(__file__).parents[1] / "configs" / "train" / "figures.yaml"


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """What exists only after somebody's code ran."""
    return tmp_path / "executed"


def test_the_payload_works(proof: Path) -> None:
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"state_dict": {"w": it}}, lambda it: {it: torch.ones(1)}])
def test_pickled_code_in_weights_is_not_run(
    name: str, is_zip: bool, wrap: Callable[[Any], Any], tmp_path: Path, proof: Path
) -> None:
    torch.save(wrap(Payload(proof)), tmp_path / name, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights"):
        read_weights(tmp_path / name)
    assert not proof.exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint's folder."""
    run = RunDirectory(str(tmp_path), "run")
    config = load(TrainConfig, FIGURES).model_dump(mode="json")
    made = Checkpoint({"w": torch.ones(2)}, {"criterion": {}}, Position(0, 0, 1), None, {"config": config})
    checkpoints.save(run, made, is_best=True, keep=1)
    return run.path("checkpoints", "step_00000001")


def seal(folder: Path) -> None:
    """Make the checksums fit, as someone would who means harm."""
    meta = json.loads((folder / META).read_text())
    content = {name: (folder / name).read_bytes() for name in (WEIGHTS, TRAINING)}
    meta["files"] = {name: f"crc32:{zlib.crc32(data):08x}:{len(data)}" for name, data in content.items()}
    (folder / META).write_text(json.dumps(meta))


@pytest.mark.parametrize("file", [WEIGHTS, TRAINING])
def test_pickled_code_in_a_checkpoint_is_not_run(file: str, checkpoint: Path, proof: Path) -> None:
    torch.save({"criterion": Payload(proof)}, checkpoint / file)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=f"is damaged: {file}: "):
        checkpoints.read(checkpoint)
    if file == WEIGHTS:
        with pytest.raises(CheckpointError, match=f"is damaged: {file}: "):
            build.trained_extractor(str(checkpoint))
    assert not proof.exists()


TAGS = ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]", "!!python/name:os.mkdir"]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_yaml_make_nothing(tag: str, tmp_path: Path, proof: Path) -> None:
    text = tag.format(proof)
    config = load(TrainConfig, FIGURES)
    config = config.model_copy(update={"run": config.run.model_copy(update={"storage": str(tmp_path)})})
    (tmp_path / config.run.name).mkdir()
    for path in (tmp_path / "config.yaml", tmp_path / config.run.name / "config.yaml"):
        path.write_text(f"seed: {text}\n")
    for call in (
        lambda: load(TrainConfig, tmp_path / "config.yaml"),
        lambda: load_sweep(tmp_path / "config.yaml"),
        lambda: load(TrainConfig, FIGURES, [f"seed={text}"]),
        lambda: load(TrainConfig, FIGURES, [f"optimizer.options={{a: {text}}}"]),
        lambda: runs.check_name(config),  # of a run that is there, made by somebody else
    ):
        with pytest.raises(ConfigError, match=r"is not valid YAML: .*tag"):
            call()
    assert not proof.exists()


def test_the_tag_works_elsewhere(proof: Path) -> None:
    yaml.load(TAGS[0].format(proof), yaml.UnsafeLoader)
    assert proof.exists()


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_a_checkpoints_meta_make_nothing(tag: str, checkpoint: Path, proof: Path) -> None:
    meta = json.loads((checkpoint / META).read_text())
    meta["config"]["seed"] = tag.format(proof)
    (checkpoint / META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="seed: should be a valid integer, found '!!python"):
        build.trained_extractor(str(checkpoint))
    (checkpoint / META).write_text(f"format: 1\nconfig: {tag.format(proof)}\n")
    with pytest.raises(CheckpointError, match=f"cannot be read: {META}"):
        build.trained_extractor(str(checkpoint))
    assert not proof.exists()


def test_a_copied_checkpoint_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object store a key may be anything, and `..` in it would lead out of the local copy."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for key in (f"/bucket/step_1/{META}", "/bucket/step_1/../../../evil.txt"):
        memory.store[key] = MemoryFile(memory, key, b"{}")
    remote = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(memory))
    monkeypatch.setattr(checkpoints, "resolve", lambda uri: (remote, "/bucket/step_1"))
    copied: list[Any] = []
    monkeypatch.setattr(checkpoints, "download", lambda *arguments: copied.append(arguments))
    with pytest.raises(CheckpointError, match=r"is not copied: its file '/bucket/step_1/\.\.' would lead out of it"):
        checkpoints.located("mock://bucket/step_1").__enter__()
    assert copied == []
    del memory.store["/bucket/step_1/../../../evil.txt"]
    with checkpoints.located("mock://bucket/step_1"):
        assert len(copied) == 1


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of images with links inside of it and out of it; beside it what is none of its business."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for path in (root / "inner" / "a.png", secret / "a.png", root / "plain.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (root / "inside.png").symlink_to(root / "inner" / "a.png")
    (root / "in").symlink_to("inner")
    (root / "out.png").symlink_to(secret / "a.png")
    (root / "relative.png").symlink_to("../secret/a.png")
    (root / "twice.png").symlink_to("out.png")
    (root / "out").symlink_to(secret)
    (root / "further").symlink_to("out")
    (root / "odd name%20.png").symlink_to(secret / "a.png")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(b"")
    (root / "beside").symlink_to(tmp_path / "root2")
    return root


@pytest.mark.parametrize(
    ("path", "is_inside"),
    [
        ("plain.png", True),
        ("inside.png", True),
        ("in/a.png", True),
        ("inner/../plain.png", True),
        ("{root}/plain.png", True),
        ("file://{root}/in/a.png", True),
        ("out.png", False),
        ("relative.png", False),
        ("twice.png", False),
        ("out/a.png", False),
        ("further/a.png", False),
        ("beside/a.png", False),
        ("out/../plain.png", True),
        ("{root}/out.png", False),
        ("file://{root}/out/a.png", False),
        ("file://{root}/odd%20name%2520.png", False),
        ("odd name%20.png", False),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_links_do_not_lead_out_of_the_root(path: str, is_inside: bool, scheme: str, linked: Path) -> None:
    path = path.format(root=linked)
    csv = linked.parent / "df.csv"
    csv.write_text(f"{HEADER}\n1,plain.png,train,,\n1,{path},train,,\n")
    table = read_table(csv, root=f"{scheme}{linked}")
    if is_inside:
        check_files_exist(table)
        return
    with pytest.raises(TableError) as caught:
        check_files_exist(table)
    assert f"1 of 2 images symbolic links lead out of {scheme}{linked}; rows 1 ({path!r})" in str(caught.value)


def test_what_is_checked_is_what_is_read(linked: Path) -> None:
    """To the system `out/..` is where the folder lies that `out` leads to."""
    (linked.parent / "plain.png").write_bytes(b"secret")
    assert (linked / "out" / ".." / "plain.png").read_bytes() == b"secret"
    assert read_bytes(linked / "out" / ".." / "plain.png") == b""


def test_the_root_itself_may_be_reached_by_a_link(linked: Path) -> None:
    (linked.parent / "data").symlink_to(linked)
    csv = linked / "df.csv"
    csv.write_text(f"{HEADER}\n1,plain.png,train,,\n1,in/a.png,train,,\n")
    check_files_exist(read_table(linked.parent / "data" / "df.csv"))
    check_files_exist(read_table(csv, root=linked.parent / "data"))


def test_links_of_queries_do_not_lead_out_either(linked: Path) -> None:
    with pytest.raises(TableError, match=r"7 of 11 images symbolic links lead out of .*rows 0 \('beside/a.png'\)"):
        read_queries(linked)
    (linked / "df.csv").write_text("path\nplain.png\nout.png\n")
    with pytest.raises(TableError, match=r"1 of 2 images symbolic links lead out of .*rows 1 \('out.png'\)"):
        read_queries(linked / "df.csv")


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "a/b", "a/../../b", "a\\b", "/etc", "~", "-rf", "", "a\n", "a\0b", "_figures"]
)
def test_a_run_is_a_plain_folder_of_its_storage(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: String should match pattern"):
        load(TrainConfig, FIGURES, [f"run.name={json.dumps(name)}"])
    sweep = {"base": str(FIGURES), "run": {"name": name}, "space": {"seed": {"grid": [1]}}, "tune": {"search": "grid"}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError, match=r"run\.name: String should match pattern"):
        load_sweep(tmp_path / "sweep.yaml")
