from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from oml_ray.errors import CheckpointError, ConfigError
from oml_ray.learning.extractors import Extractor, timm_extractor
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
    with pytest.raises(CheckpointError, match="cannot be read as weights: it holds pickled Python objects"):
        read_weights(tmp_path / "w.pth")


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        read_weights(tmp_path / "nowhere.pth")


def unpooled(extractor: Extractor) -> torch.Tensor:
    """What the backbone gives before its pooling."""
    pixels = (images().float() - extractor.mean) / extractor.std
    with torch.no_grad():
        features: torch.Tensor = extractor.backbone.forward_features(pixels)
    return features


POOLS = {
    "avg": lambda values: values.mean(-1),
    "max": lambda values: values.amax(-1),
    "avgmax": lambda values: (values.mean(-1) + values.amax(-1)) / 2,
    "gem": lambda values: values.double().clamp(min=1e-6).pow(3).mean(-1).pow(1 / 3).float(),
}


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax", "gem"])
def test_feature_maps_are_pooled_as_asked(pooling: str) -> None:
    extractor = timm_extractor("test_resnet", size=64, pooling=pooling, normalize=False).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        embeddings = extractor(images())
    torch.testing.assert_close(embeddings, POOLS[pooling](unpooled(extractor).flatten(2)))


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax", "gem"])
def test_tokens_are_pooled_over_patches_alone(pooling: str) -> None:
    extractor = timm_extractor("test_vit", size=64, pooling=pooling, normalize=False).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        embeddings = extractor(images())
    patches = unpooled(extractor)[:, 1:]
    assert patches.shape[1] == (64 // 16) ** 2
    torch.testing.assert_close(embeddings, POOLS[pooling](patches.transpose(1, 2)))


@pytest.mark.parametrize(("model", "positions"), [("test_convnext", (2, 3)), ("test_mambaout", (1, 2))])
def test_what_follows_the_networks_pooling_follows_gem(model: str, positions: tuple[int, int]) -> None:
    """Both have layers behind their pooling; the second network keeps channels last."""
    extractor = timm_extractor(model, size=64, pooling="gem", gem_p=1.0, normalize=False).eval()
    head = extractor.backbone.head
    with torch.no_grad():
        pooled = unpooled(extractor).clamp(min=1e-6).mean(positions)
        expected = head.pre_logits(torch.nn.functional.layer_norm(pooled, pooled.shape[1:], eps=head.norm.eps))
        torch.testing.assert_close(extractor(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["avg", "gem"])
@pytest.mark.parametrize("model", ["test_vit", "test_vit3", "test_resnet"])
def test_weights_load_whatever_the_pooling(model: str, pooling: str) -> None:
    """A ViT of timm that is built for another pooling moves its last norm, whose weights then find no place."""
    whole = timm.create_model(model).state_dict()
    state = {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in whole.items()}
    extractor = timm_extractor(model, size=64, weights=state, pooling=pooling)  # type: ignore[arg-type]
    assert "state_dict" not in extractor.backbone.pretrained_cfg  # or all weights would be kept twice
    for name, value in extractor.backbone.state_dict().items():
        if name != "pos_embed":  # resampled to the size
            assert torch.equal(value, state[name]), name


def test_a_state_with_gem_is_plain_and_comes_back() -> None:
    extractor, other = (timm_extractor("test_resnet", size=64, embedding_dim=8, pooling="gem").eval() for _ in range(2))
    default = timm_extractor("test_resnet", size=64, embedding_dim=8)
    torch.nn.init.constant_(extractor.pooling.p, 4.5)
    assert set(extractor.state_dict()) - set(default.state_dict()) == {"pooling.p"}
    other.load_state_dict(extractor.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images()), extractor(images()))


def test_the_exponent_learns_while_the_backbone_is_frozen() -> None:
    extractor = timm_extractor("test_resnet", size=64, pooling="gem")
    extractor.freeze_backbone(True)
    extractor(images())[:, 0].sum().backward()
    assert extractor.pooling.p.grad is not None
    assert all(parameter.grad is None for parameter in extractor.backbone.parameters())


@pytest.mark.parametrize(
    ("model", "pooling", "message"),
    [
        ("pvt_v2_b0", "max", "pvt_v2_b0 has no max pooling.*Only avg"),
        ("efficientvit_b0", "gem", "efficientvit_b0 has no gem pooling.*Cannot disable"),
        ("efficientvim_m1", "gem", "efficientvim_m1 cannot pool by gem"),
        ("pit_ti_224", "gem", "pit_ti_224 does not say which of its tokens are patches"),
    ],
)
def test_poolings_that_a_network_cannot_do_are_refused(model: str, pooling: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"extractor.pooling: {message}"):
        timm_extractor(model, size=224, pooling=pooling)  # type: ignore[arg-type]


def test_the_last_layer_is_kept_on_demand() -> None:
    state = timm.create_model("test_vit", num_classes=1000).state_dict()
    extractor = timm_extractor("test_vit", size=64, weights=state, keep_head=True)
    assert extractor.embedding_dim == 1000
    assert torch.equal(extractor.backbone.head.weight, state["head.weight"])
    with pytest.raises(ConfigError, match="only with its own pooling"):
        timm_extractor("test_vit", size=64, keep_head=True, pooling="gem")


def test_a_download_is_announced_and_its_failure_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(model: str, **options: Any) -> Any:
        assert "downloading the weights of resnet18 from https://huggingface.co/timm/" in caplog.text, "before the wait"
        raise ConnectionError("Max retries exceeded")

    monkeypatch.setattr("oml_ray.learning.extractors.timm.create_model", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(ConfigError) as error:
        timm_extractor("resnet18", size=32, pretrained=True)
    for part in ("extractor.pretrained", "https://huggingface.co/timm/", "Max retries", "extractor.weights", "HF_HOME"):
        assert part in str(error.value)


def test_weights_in_the_cache_are_not_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        "oml_ray.learning.extractors.timm.create_model",
        lambda model, **options: create(model, **{**options, "pretrained": False}),
    )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: f"/cache/{name}")
    timm_extractor("resnet18", size=32, pretrained=True)
    assert caplog.text == ""
