"""Checkpoints and weights: whatever was done to the files, they are read whole or refused by one message."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign_checks import SECONDS, campaign, damaged, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from oml_ray.errors import OmlRayError
from oml_ray.learning.weights import read_weights
from oml_ray.training import checkpoint as checkpoints
from oml_ray.training.checkpoint import META, TRAINING, WEIGHTS, Checkpoint, Position
from oml_ray.training.run_directory import History, RunDirectory

pytestmark = pytest.mark.timeout(SECONDS)

STEP = "step_00000005"
Files = dict[str, bytes]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, generator=generator)
    return {"weight": weight, "half": weight.half(), "count": torch.tensor(seed), "none": torch.empty(0, 2)}


EXTRACTOR, OTHER = tensors(5), tensors(6)
STATE: dict[str, Any] = {"criterion": {"p": torch.ones(2)}, "optimizer": {"state": {0: {"step": 1.0}}}, "scaler": None}
MORE = {"config": {"seed": 1, "extractor": {"name": "timm"}}, "table": "abc", "epoch": {"loss": 0.5}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of a checkpoint, and of another one by the same run."""
    run = RunDirectory(str(tmp_path_factory.mktemp("whole")), "run")
    for step, extractor in ((5, EXTRACTOR), (6, OTHER)):
        made = Checkpoint(extractor, STATE, Position(1, 2, step), 0.5, MORE)
        checkpoints.save(run, made, is_best=True, keep=2)
    folders = {name: run.path("checkpoints", name) for name in (STEP, "step_00000006")}
    return {name: {file.name: file.read_bytes() for file in path.iterdir()} for name, path in folders.items()}


def write(folder: Path, files: Files, last: bytes = STEP.encode()) -> RunDirectory:
    """A run with this one checkpoint."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = RunDirectory(str(folder), "run")
    run.path("checkpoints", STEP).mkdir(parents=True)
    for name, data in files.items():
        run.path("checkpoints", STEP, name).write_bytes(data)
    for pointer in ("best", "last"):
        run.path("checkpoints", pointer).write_bytes(last)
    return run


def resealed(files: Files) -> Files:
    """As someone leaves them who means harm: with checksums that fit."""
    try:
        meta = json.loads(files[META])
        meta["files"] = {
            name: f"crc32:{zlib.crc32(data):08x}:{len(data)}" for name, data in files.items() if name != META
        }
        return {**files, META: json.dumps(meta).encode()}
    except (KeyError, TypeError, ValueError, RecursionError):
        return files


def check(run: RunDirectory) -> list[Checkpoint]:
    """Read a run's checkpoint in every way; return what was found."""
    folder, found = run.path("checkpoints", STEP), []
    for call in (lambda: located(run, "best"), lambda: checkpoints.latest(run)):
        read = outcome(call, "checkpoint")
        if isinstance(read, Checkpoint):
            found.append(read)
            position = read.position
            assert all(isinstance(part, int) and part >= 0 for part in vars(position).values())
            assert read.best is None or abs(read.best) < float("inf")
            assert isinstance(read.training, dict)
            assert all(isinstance(value, torch.Tensor) for value in read.extractor.values())
        else:
            assert read is None or isinstance(read, OmlRayError)
    outcome(lambda: checkpoints.read_extractor(folder), str(folder))
    outcome(lambda: checkpoints.check(folder, [WEIGHTS, TRAINING]), str(folder))
    return found


def located(run: RunDirectory, pointer: str) -> Checkpoint:
    with checkpoints.located(f"{run.uri}/checkpoints/{pointer}") as folder:
        return checkpoints.read(folder)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@st.composite
def faults(draw: st.DrawFn) -> Callable[[dict[str, Files]], Files]:
    """What is done to the files of a checkpoint, to be applied to them."""
    name = draw(st.sampled_from([WEIGHTS, TRAINING, META]))
    kind = draw(st.sampled_from(["damaged", "damaged", "removed", "another's", "swapped", "emptied"]))
    seed = draw(st.randoms(use_true_random=False))

    def apply(whole: dict[str, Files]) -> Files:
        files = dict(whole[STEP])
        if kind == "damaged":
            for _ in range(seed.randint(1, 3)):
                data = bytearray(files[name])
                at = seed.randrange(len(data))
                if seed.random() < 0.3:
                    del data[at:]
                else:
                    data[at] ^= 1 << seed.randrange(8)
                files[name] = bytes(data) or b"\0"
        elif kind == "removed":
            del files[name]
        elif kind == "another's":
            files[name] = whole["step_00000006"][name]
        elif kind == "swapped":
            files[WEIGHTS], files[TRAINING] = files[TRAINING], files[WEIGHTS]
        elif kind == "emptied":
            files[name] = b""
        return files

    return apply


@campaign(150)
@given(faults(), st.booleans())
def test_damaged_files(
    folder: Path, whole: dict[str, Files], fault: Callable[[dict[str, Files]], Files], is_resealed: bool
) -> None:
    files = fault(whole)
    found = check(write(folder, resealed(files) if is_resealed else files))
    if not is_resealed:  # then it is what was saved, or refused; `meta.json` itself has no checksum
        assert all(same(read.extractor, EXTRACTOR) for read in found)
        assert all(read.training.keys() == STATE.keys() for read in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["format", "position", "best", "files", "config", "table", "epoch"]


@st.composite
def edits(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of `meta.json` with other values; `...` where they are removed."""
    values = st.one_of(JSON, st.just(...), st.fixed_dictionaries({"epoch": JSON, "step": JSON, "global_step": JSON}))
    return draw(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=2))


@campaign(150)
@given(edits())
@example({"files": []})
@example({"files": {WEIGHTS: ["crc32"]}})
@example({"position": None})
@example({"position": {"epoch": 1}})
@example({"position": {"epoch": "1", "step": 0, "global_step": 0}})
@example({"position": {"epoch": -1, "step": 0, "global_step": 0}})
@example({"best": "high"})
@example({"best": 10**400})
@example({"best": float("nan")})
@example({"best": ...})
def test_edited_meta(folder: Path, whole: dict[str, Files], changes: dict[str, Any]) -> None:
    meta = {**json.loads(whole[STEP][META]), **changes}
    text = json.dumps({key: value for key, value in meta.items() if value is not ...})
    check(write(folder, {**whole[STEP], META: text.encode()}))


@campaign(100)
@given(st.data())
def test_damaged_meta(folder: Path, whole: dict[str, Files], data: st.DataObject) -> None:
    check(write(folder, {**whole[STEP], META: data.draw(damaged(whole[STEP][META]))}))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"null", b"[]", b""], ids=range(7)
)
def test_meta_that_is_no_meta(text: bytes, tmp_path: Path, whole: dict[str, Files]) -> None:
    assert check(write(tmp_path, {**whole[STEP], META: text})) == []


@campaign(100)
@given(st.one_of(st.binary(max_size=40), damaged(STEP.encode())))
@example(b"\xff\xfe")
@example(b"step_\x00")
@example(b"step_..")
@example(b"../checkpoints/step_00000005")
@example(b"step_00000005\n")
@example(b"step_" + b"x" * 300)
@example(b"step_\n\x01")
def test_damaged_pointers(folder: Path, whole: dict[str, Files], last: bytes) -> None:
    for found in check(write(folder, whole[STEP], last)):
        assert same(found.extractor, EXTRACTOR)


HISTORY = b'{"kind": "train", "epoch": 0, "step": 5, "loss": 0.5}\n{"kind": "validation", "step": 5, "cmc.1": 0.25}\n'


@campaign(100)
@given(damaged(HISTORY))
@example(b"1\n")
@example(b"[]\n")
@example(b"{}\n")
@example(b'{"step": "1"}\n')
@example(b"[" * 100_000 + b"\n")
@example(b"\xff\n")
def test_damaged_history(folder: Path, data: bytes) -> None:
    run = RunDirectory(str(folder), "history")
    run.path(History.NAME).write_bytes(data)
    history = outcome(lambda: History(run), run.uri, History.NAME)
    if isinstance(history, History):
        history.rewind(4)
        assert all(row["step"] <= 4 for row in history.rows)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in EXTRACTOR.items()}}, folder / "a.pt"
    )
    torch.save(EXTRACTOR, folder / "b.pth", _use_new_zipfile_serialization=False)
    save_file(EXTRACTOR, folder / "c.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.pt", "b.pth", "c.safetensors"])
@campaign(200)
@given(data=st.data())
def test_damaged_weights(folder: Path, weights: Files, name: str, data: st.DataObject) -> None:
    (folder / name).write_bytes(data.draw(damaged(weights[name])))
    found = outcome(lambda: read_weights(folder / name), str(folder / name))
    if not isinstance(found, OmlRayError):
        assert found
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items())
        assert all(value.isnan().any() in (True, False) for value in found.values()), "every value is there"


@pytest.mark.parametrize("name", ["a.pt", "b.pth", "c.safetensors"])
def test_whole_weights_are_read(name: str, tmp_path: Path, weights: Files) -> None:
    """What is damaged above is a file of weights before it."""
    (tmp_path / name).write_bytes(weights[name])
    assert same(read_weights(tmp_path / name), EXTRACTOR)
