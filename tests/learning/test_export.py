"""Exported models against torch, read by what they are for: onnxruntime, plain torch, timm."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import oml_ray
from oml_ray.errors import ConfigError, ExportError, StorageError
from oml_ray.learning import unicom
from oml_ray.learning.export import onnx_file, program, sameness, timm_folder
from oml_ray.learning.extractors import Extractor, timm_extractor

SIZE = 32
SQUASH = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
MODELS: dict[str, dict[str, Any]] = {
    "a linear projection": {"model": "test_vit", "embedding_dim": 8},
    "features as they are": {"model": "test_resnet", "normalize": False},
    "another pooling": {"model": "test_resnet", "pooling": "avgmax", "embedding_dim": 8},
    "gem": {"model": "test_resnet", "pooling": "gem"},
    "tokens by gem, hidden layers": {"model": "test_vit", "pooling": "gem", "embedding_dim": 8, "hidden_dims": [16]},
    "resnet10t": {"model": "resnet10t", "pooling": "gem", "embedding_dim": 8},
    "vit_tiny": {"model": "vit_tiny_patch16_224", "pooling": "avg", "embedding_dim": 8, "normalize": False},
    "its own last layer": {"model": "vit_base_patch32_clip_quickgelu_224.openai", "keep_head": True},
}
SLOW = ("resnet10t", "vit_tiny", "its own last layer")  # large ones
TRACED_SLOWLY = (*SLOW, "another pooling", "gem")
WITHOUT_TIMM = ("gem", "tokens by gem, hidden layers", "resnet10t")  # what timm's networks cannot have


def extractor(name: str) -> Extractor:
    """One of the models, with weights and batch statistics as after a training; in training mode."""
    torch.manual_seed(0)
    made = timm_extractor(size=SIZE, **MODELS[name])
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand_like(tensor)
    return made


def each(slow: tuple[str, ...], without: tuple[str, ...] = ()) -> Any:
    names = [name for name in MODELS if name not in without]
    marks = {name: pytest.mark.slow if name in slow else () for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


def batch(n: int, size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def embedded(by: Extractor, images: Tensor) -> Tensor:
    """In evaluation mode, and in one go: the batch must not matter."""
    was = by.training
    embeddings: Tensor = by.eval()(images)
    by.train(was)
    return embeddings


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)


@each(TRACED_SLOWLY)
def test_onnxruntime_gives_what_torch_gives(name: str, tmp_path: Path) -> None:
    made, path = extractor(name), tmp_path / "model.onnx"
    facts = {"network": "a name", "transform": {"size": SIZE}, "labels": ["ä", 1]}
    assert onnx_file.write_onnx(made, path, size=SIZE, facts=facts) < 1e-4
    assert made.training
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 3, 8):
        (found,) = session.run(None, {"images": batch(n).numpy()})
        assert found.dtype == "float32"
        assert_near(torch.from_numpy(found), embedded(made, batch(n)))
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["n", 3, SIZE, SIZE])
    assert (got.name, got.shape) == ("embeddings", ["n", made.embedding_dim])
    kept = session.get_modelmeta().custom_metadata_map
    assert kept["network"] == "a name"
    assert (json.loads(kept["transform"]), json.loads(kept["labels"])) == ({"size": SIZE}, ["ä", 1])
    onnx.checker.check_model(onnx.load(path, load_external_data=False), full_check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "weights are in the one file"
    assert str(Path(oml_ray.__file__).parent).encode() not in path.read_bytes()


@each((*TRACED_SLOWLY, "features as they are"))
def test_plain_torch_runs_the_program(name: str, tmp_path: Path) -> None:
    made, path = extractor(name), tmp_path / "model.pt2"
    assert program.write_program(made, path, size=SIZE, facts={"network": name}) < 1e-6
    assert made.training
    kept = {program.FACTS: ""}
    loaded = torch.export.load(path, extra_files=kept).module()
    assert json.loads(kept[program.FACTS]) == {"network": name}
    with torch.no_grad():
        for n in (1, 3, 8):
            torch.testing.assert_close(loaded(batch(n)), embedded(made, batch(n)), atol=1e-6, rtol=1e-5)
    assert str(Path(oml_ray.__file__).parent).encode() not in path.read_bytes()


def test_the_program_needs_neither_oml_ray_nor_timm(tmp_path: Path) -> None:
    made = extractor("a linear projection")
    program.write_program(made, tmp_path / "model.pt2", size=SIZE, facts={})
    code = (
        "import sys; sys.modules.update(oml_ray=None, timm=None); import torch\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(torch.load('images.pt')).detach(), 'found.pt')"
    )
    torch.save(batch(4), tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_near(torch.load(tmp_path / "found.pt"), embedded(made, batch(4)))


@each(SLOW, WITHOUT_TIMM)
def test_timm_loads_the_folder(name: str, tmp_path: Path) -> None:
    made, folder = extractor(name), tmp_path / "model"
    assert timm_folder.write_timm(made, folder, size=SIZE, facts={"a": 1}, preparation=SQUASH) < 1e-4
    assert made.training
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "oml_ray.json"]
    assert json.loads((folder / "oml_ray.json").read_text()) == {"a": 1}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "who reads one reads all"
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_data_config({}, model=network)
    assert (data["input_size"], data["crop_mode"]) == ((3, SIZE, SIZE), "squash")
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = network((batch(3) / 255 - mean) / std)
    assert_near(nn.functional.normalize(found) if made.normalize else found, embedded(made, batch(3)))
    state, backbone = load_file(folder / "model.safetensors"), made.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in backbone.items())
    projection = [value for key, value in state.items() if key not in backbone]
    assert len(projection) == len(list(made.projection.parameters()))


@pytest.mark.slow
def test_a_network_that_is_none_of_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = unicom.Architecture(patch=16, width=64, depth=2, heads=2, num_features=24, size=64)
    monkeypatch.setitem(unicom.ARCHITECTURES, "small", small)
    made = unicom.unicom_extractor("small", size=64, embedding_dim=8)
    onnx_file.write_onnx(made, tmp_path / "model.onnx", size=64, facts={})
    program.write_program(made, tmp_path / "model.pt2", size=64, facts={})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": batch(3, 64).numpy()})
    assert_near(torch.from_numpy(found), embedded(made, batch(3, 64)))
    assert_near(torch.export.load(tmp_path / "model.pt2").module()(batch(3, 64)), embedded(made, batch(3, 64)))


class Plain(nn.Module):
    """A backbone that is none of timm's: features are the pixels of each channel's mean, by some function."""

    def __init__(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Tensor:
        return self.function(pixels.mean((2, 3)))


def plain(function: Callable[[Tensor], Tensor] = lambda x: x, factor: float = 255.0) -> Extractor:
    """Embeds as `function` of the channels' means, from 0 to `factor`."""
    std = [1 / factor] * 3
    return Extractor(Plain(function), nn.Identity(), embedding_dim=3, mean=[0.0] * 3, std=std, normalize=False).eval()


def only_some(x: Tensor) -> Tensor:
    return x if x.sum() > 3 else -x


def with_projection_behind() -> Extractor:
    made = timm_extractor("test_vit", size=SIZE, keep_head=True, embedding_dim=8)
    assert made.backbone.num_classes
    return made


TIMM_REFUSES = {
    "gem": (lambda: extractor("gem"), "timm's networks have no pooling gem: export the form torch"),
    "hidden layers": (lambda: extractor("tokens by gem, hidden layers"), "no pooling gem"),
    "an MLP": (
        lambda: timm_extractor("test_vit", size=SIZE, embedding_dim=8, hidden_dims=[9]),
        r"end with one linear layer, and this one has hidden layers and a projection \(3 parts\)",
    ),
    "a projection behind the head": (with_projection_behind, "one linear layer, and this one has a projection behind"),
    "two classifiers": (
        lambda: timm_extractor("deit_tiny_distilled_patch16_224", size=SIZE, embedding_dim=8),
        "timm cannot have the projection as its classifier",
    ),
    "another network": (plain, "timm has no network of this kind"),
}


@pytest.mark.parametrize("name", TIMM_REFUSES)
def test_timm_gets_all_of_a_model_or_nothing(name: str, tmp_path: Path) -> None:
    make, message = TIMM_REFUSES[name]
    with pytest.raises(ExportError, match=message):
        timm_folder.write_timm(make(), tmp_path / "model", size=SIZE, facts={}, preparation=SQUASH)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.special.bessel_j0, r"ONNX cannot express this network: No ONNX function found for .*bessel_j0"),
        (only_some, r"torch.export cannot trace this network: Could not guard on data-dependent"),
    ],
)
def test_what_onnx_cannot_express_is_named(
    function: Callable[[Tensor], Tensor], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        onnx_file.write_onnx(plain(function), tmp_path / "model.onnx", size=SIZE, facts={})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", ""), "torch's own reports stay away"


def test_a_model_that_is_written_otherwise_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writers get a network whose weights are a little off."""
    trace, save = program.traced, timm_folder.save_for_hf

    def moved(network: nn.Module) -> nn.Module:
        network = timm_extractor("test_vit", size=SIZE).eval() if isinstance(network, Extractor) else network
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        return network

    made = timm_extractor("test_vit", size=SIZE)
    for module in (program, onnx_file):
        monkeypatch.setattr(module, "traced", lambda network, size: trace(moved(network), size))
    monkeypatch.setattr(timm_folder, "save_for_hf", lambda network, *rest, **more: save(moved(network), *rest, **more))
    for write, more in (
        (program.write_program, {}),
        (onnx_file.write_onnx, {}),
        (timm_folder.write_timm, {"preparation": SQUASH}),
    ):
        with pytest.raises(ExportError, match=r"differs from torch by .* in a batch of 1; 0.0001 is allowed"):
            write(made, tmp_path / write.__name__, size=SIZE, facts={}, **more)


def test_the_difference_is_of_embeddings_in_every_batch() -> None:
    made = plain(factor=1.0)  # embeddings within [0, 1]
    assert sameness.largest_difference(made, made, SIZE, what="It") == 0
    shift = 0.5e-4
    found = sameness.largest_difference(made, lambda images: made(images) + shift, SIZE, what="It")
    assert found == pytest.approx(shift, rel=0.01)
    for factor in (1.0, 1000.0):  # of longer embeddings as a share of the largest value, about half of `factor`
        wide = plain(factor=factor)
        for allowed, shift in ((True, 0.3e-4 * factor), (False, 1.5e-4 * factor)):
            given = (wide, lambda images, shift=shift, wide=wide: wide(images) + shift, SIZE)
            if allowed:
                assert 0 < sameness.largest_difference(*given, what="It") <= 1e-4
            else:
                with pytest.raises(ExportError, match="It differs from torch by"):
                    sameness.largest_difference(*given, what="It")


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        (lambda images: plain()(images) * torch.nan, "differs from torch by nan in a batch of 1"),
        (lambda images: plain()(images)[:, :2], r"shape \(1, 2\) where torch gives \(1, 3\)"),
        (lambda images: plain()(images) if len(images) == 1 else {}[len(images)], "cannot embed a batch of 2: 2"),
    ],
)
def test_what_is_no_embedding_is_refused(exported: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        sameness.largest_difference(plain(), exported, SIZE, what="It")


def test_embeddings_that_are_not_finite_are_refused() -> None:
    broken = plain(lambda x: x / 0)
    with pytest.raises(ExportError, match="look whether the checkpoint's own embeddings are finite"):
        sameness.largest_difference(broken, broken, SIZE, what="It")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_its_packages_the_message_names_the_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.import_module

    def found(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return find(name, *rest)

    monkeypatch.setattr(importlib, "import_module", found)
    with pytest.raises(ConfigError, match=rf"No module named '{missing}'.*pip install 'oml_ray\[onnx\]'"):
        onnx_file.write_onnx(plain(), tmp_path / "model.onnx", size=SIZE, facts={})


def test_weights_beyond_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm_extractor("test_vit", size=SIZE)
    num_bytes = sum(tensor.nbytes for tensor in made.state_dict().values())
    monkeypatch.setattr(onnx_file, "MAX_BYTES", num_bytes - 1)
    with pytest.raises(ExportError, match="one ONNX file holds less than 2 GiB: export the form torch"):
        onnx_file.write_onnx(made, tmp_path / "model.onnx", size=SIZE, facts={})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_message() -> None:
    with pytest.raises(StorageError, match=r"/dev/full cannot be written: "):
        program.write_program(plain(), Path("/dev/full"), size=SIZE, facts={})
    with pytest.raises(StorageError, match=r"/dev/full cannot be written: .*[Nn]o space"):
        onnx_file.write_onnx(plain(), Path("/dev/full"), size=SIZE, facts={})


def test_what_is_logged_is_kept_while_torch_traces_alone(caplog: pytest.LogCaptureFixture) -> None:
    with sameness.quiet():
        logging.getLogger("of.torch").error("of the body")
    logging.getLogger("of.torch").error("of what follows")
    assert [record.message for record in caplog.records] == ["of what follows"]
