from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning.extractors import timm_extractor
from oml_ray.learning.weights import fit_names, read_weights


def images(size: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8))


def test_input_normalisation_is_the_backbones_own() -> None:
    extractor = timm_extractor("test_resnet", size=64, normalize=False).eval()
    data = extractor.backbone.pretrained_cfg
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = extractor.backbone((images() / 255 - mean) / std)
        torch.testing.assert_close(extractor(images()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "embedding_dim", "hidden_dims", "width"),
    [("test_resnet", None, [], 96), ("test_vit", 32, [], 32), ("test_vit", 8, [24, 16], 8)],
)
def test_shapes_and_norms(model: str, embedding_dim: int | None, hidden_dims: list[int], width: int) -> None:
    extractor = timm_extractor(model, size=64, embedding_dim=embedding_dim, hidden_dims=hidden_dims).eval()
    with torch.no_grad():
        embeddings = extractor(images())
    assert embeddings.shape == (2, width) == (2, extractor.embedding_dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_position_embeddings_fit_the_input_size() -> None:
    assert timm_extractor("test_vit", size=96).eval()(images(96)).shape == (2, 64)


def test_weights_load_by_name(tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet")  # with its classifier, as pretrained files have it
    for path, save in (
        ("w.safetensors", save_file),
        ("w.pth", lambda state, file: torch.save({"state_dict": state}, file)),
    ):
        save(whole.state_dict(), tmp_path / path)
        extractor = timm_extractor("test_resnet", size=64, weights=read_weights(tmp_path / path))
        for name, value in extractor.backbone.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


def test_weights_load_in_order_where_only_names_differ() -> None:
    state = timm.create_model("test_resnet").state_dict()
    renamed = {f"_part{index}.{name.rpartition('.')[2]}": value for index, (name, value) in enumerate(state.items())}
    extractor = timm_extractor("test_resnet", size=64, weights=renamed)
    for name, value in extractor.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_same_shapes_in_another_order_do_not_fit() -> None:
    reference = {"a.weight": torch.zeros(2), "a.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="another architecture"):
        fit_names({"x.bias": torch.ones(2), "x.weight": torch.zeros(2)}, [reference], name="net")


def test_weights_of_another_architecture_are_refused() -> None:
    state = timm.create_model("test_vit").state_dict()
    with pytest.raises(
        CheckpointError, match=r"another architecture than test_resnet: \d+ tensors against \d+.*missing"
    ):
        timm_extractor("test_resnet", size=64, weights=state)


def test_unknown_models_are_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet10tt'.*resnet10t"):
        timm_extractor("resnet10tt", size=64)


def test_hidden_layers_need_a_last_width() -> None:
    with pytest.raises(ConfigError, match="embedding_dim"):
        timm_extractor("test_vit", size=64, hidden_dims=[8])


def test_a_frozen_backbone_neither_learns_nor_counts() -> None:
    extractor = timm_extractor("test_resnet", size=64, embedding_dim=4)
    extractor.freeze_backbone(True)
    before = {name: value.clone() for name, value in extractor.backbone.state_dict().items()}
    extractor.train()
    extractor(images()).sum().backward()
    assert all(parameter.grad is None for parameter in extractor.backbone.parameters())
    assert all(parameter.grad is not None for parameter in extractor.projection.parameters())
    assert all(torch.equal(value, before[name]) for name, value in extractor.backbone.state_dict().items())
    extractor.freeze_backbone(False)
    extractor(images()).sum().backward()
    assert any(not torch.equal(value, before[name]) for name, value in extractor.backbone.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} cannot be read as weights"):
        read_weights(path)


class Evil:
    """Pickles to code that runs where it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    torch.save({"w": Evil()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="pickled code is refused"):
        read_weights(tmp_path / "w.pth")


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        read_weights(tmp_path / "nowhere.pth")
